"""The loss of the batch at hand once more, for optimizers that compare it before and after a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.layered import LayeredOptimizer


def say_batch(optimizers: Sequence[SecondOrderOptimizer], trainer: pl.Trainer, batch: Any, index: int) -> None:
    """Give optimizers with an adaptive damping what evaluates this batch; nothing to others."""
    for optimizer in optimizers:
        if isinstance(optimizer, LayeredOptimizer) and optimizer.options.adaptive_damping is not None:
            optimizer.evaluate = evaluator(trainer, batch, index)


def evaluator(trainer: pl.Trainer, batch: Any, index: int) -> Callable[[], Tensor]:
    """A function that runs ``training_step`` on a batch again, without gradients and without logging."""

    def evaluate() -> Tensor:
        module = trainer.lightning_module
        module.log = _no_log  # type: ignore[method-assign]
        try:
            with torch.no_grad(), trainer.precision_plugin.train_step_context():
                output = trainer.strategy.training_step(batch, index)
        finally:
            del module.log
        loss = cast(Tensor, output["loss"] if isinstance(output, dict) else output)
        return loss

    return evaluate


def _no_log(*args: Any, **options: Any) -> None:
    """What was logged for this batch counts once."""
