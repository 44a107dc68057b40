"""Train a small GPT on real text by yaml alone: nothing here knows of second order.

python cli.py fit --config soo.yaml --config launch/fsdp2_cpu.yaml
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

import lightning as L
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from small_gpt import SmallGPT
from windows import Windows


class Text(L.LightningDataModule):
    """The same global batches however many ranks share them.

    Args:
        steps: global batches in an epoch.
        global_batch: windows in one; the number of ranks must divide it.
        length: of a window, as the model's.
    """

    def __init__(self, steps: int = 60, global_batch: int = 24, length: int = 64) -> None:
        super().__init__()
        self.steps, self.global_batch, self.length = steps, global_batch, length

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return self._loader("train", self.steps * self.global_batch)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return self._loader("validation", 10 * self.global_batch)

    def _loader(self, part: str, count: int) -> DataLoader[torch.Tensor]:
        assert self.trainer is not None
        ranks = self.trainer.world_size
        if self.global_batch % ranks:
            raise ValueError(f"{ranks} ranks do not divide data.global_batch={self.global_batch}")
        windows = Windows(part, count, self.length)
        sampler = DistributedSampler(windows, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(windows, self.global_batch // ranks, sampler=sampler)


if __name__ == "__main__":
    trainer = LightningCLI(SmallGPT, Text, seed_everything_default=0, save_config_kwargs={"overwrite": True}).trainer
    if trainer.is_global_zero and "validation_loss" in trainer.callback_metrics:
        print(f"validation loss {trainer.callback_metrics['validation_loss']:.4f} after {trainer.global_step} steps")
