"""Train a small GPT on real text, sharded as you like: the losses are those of one process.

python recipes/sharded/train.py --strategy soo_fsdp2 --devices 2
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

import lightning as L
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from small_gpt import SmallGPT
from windows import Windows

import lightning_soo.strategies  # registers soo_ddp, soo_fsdp, soo_fsdp2, soo_hsdp, soo_deepspeed
from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder

GLOBAL_BATCH = 24
LENGTH = 64
BLOCKS = {"precondition_frequency": 10, "start_preconditioning_step": 8, "max_preconditioner_dim": 128}
OPTIONS = {"shampoo": BLOCKS, "soap": BLOCKS, "sonew": {}}


class Data(L.LightningDataModule):
    """The same global batches however many ranks share them."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return self._loader("train", self.steps * GLOBAL_BATCH)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return self._loader("validation", 10 * GLOBAL_BATCH)

    def _loader(self, part: str, count: int) -> DataLoader[torch.Tensor]:
        assert self.trainer is not None
        ranks = self.trainer.world_size
        windows = Windows(part, count, LENGTH)
        sampler = DistributedSampler(windows, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(windows, GLOBAL_BATCH // ranks, sampler=sampler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--strategy", default="auto", help="auto, soo_ddp, soo_fsdp, soo_fsdp2, soo_hsdp, soo_deepspeed, or Lightning's"
    )
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--method", default="shampoo", choices=["shampoo", "soap", "sonew"])
    parser.add_argument("--stage", type=int, default=2, choices=[1, 2, 3], help="of ZeRO, with soo_deepspeed")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clip", type=float, default=1.0)
    arguments = parser.parse_args()
    if GLOBAL_BATCH % arguments.devices:
        parser.error(f"--devices {arguments.devices} does not divide the global batch of {GLOBAL_BATCH}")

    strategy = arguments.strategy
    if strategy == "soo_deepspeed":
        strategy = lightning_soo.strategies.SecondOrderDeepSpeedStrategy(stage=arguments.stage)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.devices))
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy=strategy,
        devices=arguments.devices,
        accelerator="auto",
        max_epochs=1,
        gradient_clip_val=arguments.clip,
        use_distributed_sampler=False,
        callbacks=[SecondOrder(arguments.method, **OPTIONS[arguments.method]), PreconditionerMonitor()],
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(SmallGPT(length=LENGTH), datamodule=Data(arguments.steps))
    loss = float(trainer.callback_metrics["validation_loss"])
    if trainer.is_global_zero:
        name = f"{arguments.method}, {arguments.strategy} on {arguments.devices}"
        print(f"{name}: validation loss {loss:.4f} after {arguments.steps} steps")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
