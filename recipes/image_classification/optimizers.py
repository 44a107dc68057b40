"""What ``configure_optimizers`` returns for a run, and the callbacks that make it second-order."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from settings import Settings
from torch import nn

from lightning_soo.callbacks import SecondOrder

TAKEN_OVER = ("shampoo", "soap", "sonew")


def make_optimizer(network: nn.Module, settings: Settings, workers: str = "auto") -> torch.optim.Optimizer:
    """SGD or AdamW, which a callback may take over; K-FAC itself, with the model, since its factors are of layers."""
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "kfac":
        return _kfac(network, settings, {**common, "workers": workers})
    if settings.optimizer == "sgd" or (settings.optimizer == "shampoo" and settings.grafting == "sgd"):
        return torch.optim.SGD(network.parameters(), momentum=settings.momentum, nesterov=True, **common)
    return torch.optim.AdamW(network.parameters(), betas=(0.9, settings.beta2), **common)


def second_order_options(settings: Settings, workers: str) -> dict[str, Any]:
    """Of shampoo, soap and sonew.

    Args:
        workers: where roots and bases are computed, see :class:`lightning_soo.Shampoo`.
    """
    if settings.optimizer == "sonew":  # has no blocks
        return {}
    names = ("max_preconditioner_dim", "statistics_frequency", "precondition_frequency")
    options = {name: getattr(settings, name) for name in names}
    start = settings.start_preconditioning_step or settings.precondition_frequency
    options |= {"start_preconditioning_step": start, "workers": workers}
    # as the committed tables were measured
    options |= {"refresh_delay": settings.precondition_frequency, "compute_dtype": "float32", "max_factor_dim": None}
    if settings.optimizer == "shampoo":
        options |= {"preconditioner_eps": settings.preconditioner_eps, "exponent_override": "2k"}
        if settings.grafting == "sgd":  # which says nothing of it
            options["betas"] = (0.0, settings.beta2)
    return options


def second_order_callbacks(settings: Settings, workers: str) -> list[Callback]:
    """One for shampoo, soap and sonew; none for the others."""
    if settings.optimizer not in TAKEN_OVER:
        return []
    return [SecondOrder(settings.optimizer, **second_order_options(settings, workers))]


def _kfac(network: nn.Module, settings: Settings, common: dict[str, Any]) -> torch.optim.Optimizer:
    from lightning_soo import KFAC

    names = ("momentum", "damping", "damping_method", "statistics_frequency", "precondition_frequency")
    common |= {name: getattr(settings, name) for name in (*names, "factor_decay", "approximation")}
    common["refresh_delay"] = settings.precondition_frequency  # as the committed tables were measured
    optional = ("kl_clip", "start_preconditioning_step", "statistics_positions")
    common |= {name: getattr(settings, name) or None for name in optional}
    optimizer = KFAC(network, **common)
    optimizer.accumulate(settings.accumulate)  # Lightning divides the loss of each part by their number
    return optimizer
