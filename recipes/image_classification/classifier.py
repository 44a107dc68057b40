"""The LightningModule of a run: nothing in it knows of sharding, and of second order K-FAC alone."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from networks import make_network
from optimizers import make_optimizer
from settings import Settings
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Classifier(L.LightningModule):
    """A network, its loss and its schedule.

    Args:
        channels, pixels: of the pictures, which are square.
        steps: of the whole run, for the schedule.
        channels_last: how weights are laid out: a third faster on CPUs, and what FSDP2 refuses to shard.
    """

    def __init__(
        self, settings: Settings, channels: int, classes: int, pixels: int, steps: int, channels_last: bool = True
    ) -> None:
        super().__init__()
        self.settings, self.steps = settings, steps
        self.network = make_network(settings, channels, classes, pixels)
        if channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)
        self.counted: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._count(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("validation")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _count(self, batch: Batch) -> None:
        """Sums, since ranks and batches may have different numbers of pictures, or none."""
        output = self(batch[0])
        loss = nn.functional.cross_entropy(output, batch[1], reduction="sum")
        right = (output.argmax(1) == batch[1]).sum()
        self.counted.append(torch.stack([right.float(), loss.float(), loss.new_tensor(len(batch[1])).float()]))

    def _report(self, part: str) -> None:
        sums = self.trainer.strategy.reduce(torch.stack(self.counted).sum(0), reduce_op="sum")
        self.counted.clear()
        self.log(f"{part}_accuracy", sums[0] / sums[2], prog_bar=True)
        self.log(f"{part}_loss", sums[1] / sums[2])

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.network, self.settings)
        warmup = max(1, round(self.settings.warmup * self.steps))

        def factor(step: int) -> float:
            left = min(1.0, max(0.0, (self.steps - step) / (self.steps - warmup + 1)))
            decayed = left if self.settings.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
            return min((step + 1) / warmup, decayed) if step < warmup else decayed

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
