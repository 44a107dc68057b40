"""A Lightning module's ``training_step`` once more, on a batch that was logged and counted already."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    import lightning.pytorch as pl


def once_more(module: pl.LightningModule, training_step: Callable[..., Any], *batch: Any) -> Any:
    """What ``training_step`` returns, without logging; metrics (torchmetrics) of the module stay as they are."""
    before = module.__dict__.get("log")
    module.log = _no_log  # type: ignore[method-assign]
    try:
        with _metrics_kept(module):
            return training_step(*batch)
    finally:
        del module.log
        if before is not None:
            module.log = before  # type: ignore[method-assign]


def _no_log(*args: Any, **options: Any) -> None:
    """What was logged for this batch counts once."""


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    package = sys.modules.get("torchmetrics")  # comes with Lightning
    metrics = [] if package is None else [one for one in module.modules() if isinstance(one, package.Metric)]
    kept = [{name: _copied(value) for name, value in vars(metric).items()} for metric in metrics]
    try:
        yield
    finally:
        for metric, values in zip(metrics, kept, strict=True):
            vars(metric).update(values)  # states are plain attributes, which updates change in place


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value
