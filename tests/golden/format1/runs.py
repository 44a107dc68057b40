"""The runs whose checkpoints lie here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import lightning_soo

COMMON = {"lr": 0.02, "precondition_frequency": 3, "workers": "inline"}
OPTIONS: dict[str, dict[str, Any]] = {
    "Shampoo": {**COMMON, "refresh_delay": 2, "max_preconditioner_dim": 8, "momentum": 0.5, "exponent_override": "2k"},
    "SOAP": {**COMMON, "refresh_delay": 2, "max_preconditioner_dim": 8},
    "SONew": {"lr": 0.02, "bandwidth": 1},
    "KFAC": {**COMMON, "refresh_delay": 2, "statistics_frequency": 1, "momentum": 0.9},
    "TrustRegionNewtonCG": {"radius": 0.5, "preconditioner": "diagonal"},
}


def build(method: str, options: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    return model, getattr(lightning_soo, method)(model, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        inputs = torch.randn(12, 6, dtype=torch.float64, generator=generator)
        targets = torch.randint(0, 4, (12,), generator=generator)

        def closure(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            return nn.functional.cross_entropy(model(inputs), targets)

        optimizer.zero_grad()
        if isinstance(optimizer, lightning_soo.TrustRegionNewtonCG):
            optimizer.step(closure)
        else:
            closure().backward()
            optimizer.step()
