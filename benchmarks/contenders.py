"""The optimizers that are measured; a peer that is not installed is left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lightning_soo import Shampoo

BETAS = (0.9, 0.99)
# the settings the README recommends where steps should cost less: bfloat16 products, a fifth of the statistics, and the
# first roots as soon as eight gradients are seen
ECONOMICAL = {
    "precondition_frequency": 50,
    "statistics_frequency": 5,
    "start_preconditioning_step": 8,
    "compute_dtype": "bfloat16",
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Attributes:
    make: the optimizer of a model at a learning rate.
    cycle: steps over which its cost repeats.
    ours: options of :class:`lightning_soo.Shampoo` other than AdamW's, for the bound.
    """

    name: str
    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    cycle: int = 10
    ours: dict[str, object] | None = None


def shampoo(name: str, **options: object) -> Contender:
    return Contender(
        name=name,
        make=lambda model, lr: Shampoo(model, lr=lr, betas=BETAS, **options),
        cycle=int(options.get("precondition_frequency", 20)),
        ours=options,
    )


def contenders() -> list[Contender]:
    """AdamW foreach is first: ratios are to it."""
    adamw = torch.optim.AdamW
    found = [
        Contender(
            name="AdamW foreach",
            make=lambda model, lr: adamw(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, foreach=True),
        ),
        Contender(
            name="AdamW fused",
            make=lambda model, lr: adamw(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True),
        ),
        shampoo("ours, defaults"),
        shampoo("ours, economical", **ECONOMICAL),
    ]
    if importlib.util.find_spec("heavyball"):
        found.append(Contender(name="HeavyBall SOAP, every 10", make=_heavyball_soap))
    if importlib.util.find_spec("pytorch_optimizer"):
        found.append(Contender(name="pytorch_optimizer ScalableShampoo, every 10", make=_scalable_shampoo))
    return found


def _heavyball_soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    import heavyball

    heavyball.utils.compile_mode = None  # its default autotunes for minutes and needs a compiler
    return heavyball.SOAP(
        model.parameters(),
        lr=lr,
        betas=BETAS,
        shampoo_beta=BETAS[1],
        weight_decay=0.0,
        precondition_frequency=10,
        max_precond_dim=1024,
        use_precond_schedule=False,
    )


def _scalable_shampoo(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import ScalableShampoo

    return ScalableShampoo(
        model.parameters(), lr=lr, betas=BETAS, start_preconditioning_step=1, preconditioning_compute_steps=10
    )
