"""An AdamW for modules that define none, so that a strategy is all they need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_soo.naming import nearest


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse what AdamW would refuse, before any process is started.

    Raises:
        TypeError: a name AdamW does not have, with the nearest it has.
        ValueError: a value AdamW does not accept.
    """
    known = [name for name in inspect.signature(torch.optim.AdamW).parameters if name != "params"]
    for name in settings:
        if name not in known:
            raise TypeError(f"optimizer_options: AdamW has no setting {name!r}{nearest(name, known)}")
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))], **settings)


def build_adamw(model: nn.Module, settings: Mapping[str, Any]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of ``model``.

    Raises:
        ValueError: no parameter is trainable.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: an optimizer cannot be built for it")
    optimizer = torch.optim.AdamW(parameters, **settings)
    rank_zero_info(f"configure_optimizers gave no optimizer: AdamW with lr={optimizer.defaults['lr']} was built")
    return optimizer


@contextmanager
def configured_by_default(
    module: pl.LightningModule, build: Callable[[], torch.optim.Optimizer], settings: Mapping[str, Any]
) -> Iterator[None]:
    """Within it, ``module.configure_optimizers()`` that returns None returns what ``build`` returns."""
    before = module.__dict__.get("configure_optimizers")
    original = module.configure_optimizers

    def configure_optimizers() -> Any:
        defined = before is not None or type(module).configure_optimizers is not pl.LightningModule.configure_optimizers
        configured = original() if defined else None  # Lightning's own only warns
        if configured is None:
            return build()
        if settings:
            rank_zero_warn("optimizer_options are not used: configure_optimizers returned an optimizer")
        return configured

    module.__dict__["configure_optimizers"] = configure_optimizers
    try:
        yield
    finally:
        del module.__dict__["configure_optimizers"]
        if before is not None:
            module.__dict__["configure_optimizers"] = before
