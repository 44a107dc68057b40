"""Replicas: every rank holds the whole model."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.strategies.ddp import DDPStrategy

from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.strategies.fabric.mixin import FabricSecondOrderMixin


class FabricSecondOrderDDPStrategy(FabricSecondOrderMixin, DDPStrategy):
    """Fabric's ``DDPStrategy`` with second-order training; takes its arguments and those of the mixin."""

    engine = "ddp"
    preconditioners_travel_with_optimizer = True

    def get_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        inner = getattr(optimizer, "optimizer", optimizer)
        if isinstance(inner, SecondOrderOptimizer):
            inner.consolidate(to=0)  # every rank saves
        return super().get_optimizer_state(optimizer)
