"""Train the autoencoder with AdamW or with Shampoo: the two differ by one callback.

python recipes/autoencoder/train.py --optimizer shampoo --devices 2
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import mnist_5k
from model import Autoencoder
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo.callbacks import SecondOrder

GLOBAL_BATCH = 250
# Short runs move fast, so roots are used at the step they were computed; bfloat16 products are four times faster here.
SHAMPOO = {
    "precondition_frequency": 20,
    "refresh_delay": 0,
    "stagger": False,
    "statistics_frequency": 5,
    "start_preconditioning_step": 10,
    "compute_dtype": "bfloat16",
}


class Record(L.Callback):
    """Loss over all ranks and seconds of training, step by step; start-up is not counted, refreshes are."""

    def __init__(self, path: Path) -> None:
        self.path, self.losses, self.seconds, self.start = path, [], [], 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach())
        self.seconds.append(time.perf_counter() - self.start)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        losses = trainer.strategy.reduce(torch.stack(self.losses), reduce_op="mean").tolist()
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["step", "seconds", "loss"])
                for step, (second, loss) in enumerate(zip(self.seconds, losses, strict=True), start=1):
                    writer.writerow([step, f"{second:.3f}", f"{loss:.4f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", choices=["adamw", "shampoo"], default="shampoo")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the csv file; the optimizer's by default")
    arguments = parser.parse_args()

    L.seed_everything(arguments.seed, verbose=False)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // arguments.devices))
    images = mnist_5k()
    model = Autoencoder(lr=arguments.lr, steps=arguments.steps)
    name = arguments.name or arguments.optimizer
    callbacks: list[L.Callback] = [Record(arguments.results / f"{name}.csv")]
    if arguments.optimizer == "shampoo":
        callbacks.append(SecondOrder("shampoo", **SHAMPOO))
    trainer = L.Trainer(
        max_steps=arguments.steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(images), GLOBAL_BATCH // arguments.devices, shuffle=True, drop_last=True)
    trainer.fit(model, loader)
    if trainer.is_global_zero:
        with torch.no_grad():
            shown = images[:12]
            torch.save({"input": shown, "output": torch.sigmoid(model(shown))}, arguments.results / f"{name}_digits.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
