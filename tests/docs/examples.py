"""What the pages' snippets are about: a model, data, a loop's pieces; and a Trainer that fits into one process."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def namespace() -> dict[str, Any]:
    """The names that snippets use without having defined them."""
    torch.manual_seed(0)
    inputs = torch.randn(32, 8)
    loader = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=8)
    return {
        "L": L,
        "torch": torch,
        "nn": nn,
        "model": Model(),
        "data": loader,
        "loader": loader,
        "loss_function": nn.CrossEntropyLoss(),
    }


def in_one_process(construct: Any) -> Any:
    """``Trainer.__init__`` with the given arguments, but on one CPU and for a few steps; strategies must be known."""

    def constructed(self: L.Trainer, **given: Any) -> None:
        strategy = given.pop("strategy", "auto")
        if isinstance(strategy, str) and strategy != "auto":
            assert strategy in StrategyRegistry, strategy
        few = {"devices": 1, "accelerator": "cpu", "num_nodes": 1, "precision": "32-true", "max_steps": 3}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        construct(self, **{**given, **few, **quiet, "strategy": "auto"})

    return constructed
