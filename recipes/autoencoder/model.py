"""The deep autoencoder of the papers: 784-1000-500-250-30-250-500-1000-784, tanh, summed cross-entropy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


class Autoencoder(L.LightningModule):
    """Args: steps: length of the schedule, 5 % warm-up and then linear decay."""

    def __init__(self, lr: float, steps: int, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise(WIDTHS)):
            linear = nn.Linear(inputs, outputs)
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers.append(linear)
            if index not in (3, len(WIDTHS) - 2):  # the code and the output are linear
                layers.append(nn.Tanh())
        self.net = nn.Sequential(*layers)
        self.lr, self.steps, self.betas = lr, steps, betas

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        (images,) = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self(images), images, reduction="sum") / len(images)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, as before: the callback takes it over."""
        return self.scheduled(torch.optim.AdamW(self.parameters(), lr=self.lr, betas=self.betas, weight_decay=0.0))

    def scheduled(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer with the schedule."""
        warmup = max(1, self.steps // 20)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / warmup) * max(0.0, min(1.0, (self.steps - step) / (self.steps - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
