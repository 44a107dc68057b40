"""The optimizers that compare.py compares, each with its defaults: only learning rates are tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from lightning_soo import SOAP, Shampoo, SONew

# 1, 3, 10, ... as people write them
LADDER = [float(f"{digit}e{exponent}") for exponent in range(-6, 2) for digit in (1, 3)]
BETAS = (0.9, 0.99)
# the same for both, in the step itself; as the tables were measured, before these became rarer by default
REFRESHED = {
    "precondition_frequency": 20,
    "refresh_delay": 0,
    "stagger": False,
    "statistics_frequency": 5,
    "start_preconditioning_step": 10,
    "max_preconditioner_dim": 1024,
    "max_factor_dim": None,
    "compute_dtype": "bfloat16",
    "workers": "inline",
    "betas": BETAS,
}


@dataclass(frozen=True)
class Contender:
    """Args: make: from parameters and a learning rate; middle: where its grid begins."""

    make: Callable[[Iterable[torch.nn.Parameter], float], torch.optim.Optimizer]
    middle: float

    def grid(self, size: int) -> list[float]:
        """`size` neighbouring values of the ladder around the middle."""
        first = min(range(len(LADDER)), key=lambda index: abs(LADDER[index] / self.middle - 1)) - size // 2
        return LADDER[first : first + size]


CONTENDERS = {
    "SGD, momentum": Contender(lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 1e-3),
    "SGD, Nesterov": Contender(lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True), 1e-3),
    "Adagrad": Contender(lambda p, lr: torch.optim.Adagrad(p, lr), 3e-3),
    "RMSprop": Contender(lambda p, lr: torch.optim.RMSprop(p, lr), 3e-4),
    "AdamW": Contender(lambda p, lr: torch.optim.AdamW(p, lr, betas=BETAS, weight_decay=0.0), 1e-3),
    "Adafactor": Contender(lambda p, lr: torch.optim.Adafactor(p, lr), 1e-2),
    "SONew, diagonal": Contender(lambda p, lr: SONew(p, lr, betas=BETAS, bandwidth=0), 1e-3),
    "SONew, tridiagonal": Contender(lambda p, lr: SONew(p, lr, betas=BETAS), 3e-3),
    "Shampoo": Contender(lambda p, lr: Shampoo(p, lr, exponent_override="2k", **REFRESHED), 1e-3),
    "SOAP": Contender(lambda p, lr: SOAP(p, lr, **REFRESHED), 1e-3),
    "SONew, band 4": Contender(lambda p, lr: SONew(p, lr, betas=BETAS, bandwidth=4), 3e-3),
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that the optimizer keeps beside the parameters, each storage once."""
    storages: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for entry in value.values():
                visit(entry)
        elif isinstance(value, (list, tuple)):
            for entry in value:
                visit(entry)

    visit(optimizer.state_dict())
    return sum(storages.values())
