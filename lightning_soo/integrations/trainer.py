"""What a Lightning Trainer, under either of its package names, knows and optimizers want to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.data import DataLoader

from lightning_soo.integrations.trainer_evaluation import once_more
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.layered import LayeredOptimizer
from lightning_soo.optim.trust_region import TrustRegionNewtonCG

if TYPE_CHECKING:
    import lightning.pytorch as pl


def second_order_optimizers(trainer: pl.Trainer) -> list[SecondOrderOptimizer]:
    """The trainer's optimizers that are ours, or those inside an engine's own optimizer."""
    if is_ours(trainer.strategy):
        found: list[SecondOrderOptimizer] = trainer.strategy.second_order_optimizers  # type: ignore[attr-defined]
        return found
    inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]  # DeepSpeed wraps it
    return [optimizer for optimizer in inner if isinstance(optimizer, SecondOrderOptimizer)]


def monitored_optimizers(trainer: pl.Trainer) -> Sequence[SecondOrderOptimizer | TrustRegionNewtonCG]:
    """Those of the trainer's optimizers that have diagnostics."""
    return second_order_optimizers(trainer) or trust_region_optimizers(trainer)


def trust_region_optimizers(trainer: pl.Trainer) -> list[TrustRegionNewtonCG]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, TrustRegionNewtonCG)]


def is_ours(strategy: Any) -> bool:
    """Whether a strategy attaches, saves and closes second-order optimizers itself."""
    return hasattr(strategy, "second_order_optimizers")  # its class would have to be imported


def say_accumulation(optimizers: Sequence[SecondOrderOptimizer], trainer: pl.Trainer) -> None:
    """Tell optimizers that look at single examples what the Trainer divides and scales losses by.

    In manual optimization the module divides them, and says so itself by ``optimizer.accumulate``.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, LayeredOptimizer):
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            automatic = trainer.lightning_module.automatic_optimization
            optimizer.accumulate(trainer.accumulate_grad_batches if automatic else optimizer.micro_batches, scaler)


def data_workers(trainer: pl.Trainer) -> int:
    """Data loading processes of this rank, in any collection of loaders; known from ``on_train_start`` on."""
    return sum(loader.num_workers for loader in tree_iter(trainer.train_dataloader) if isinstance(loader, DataLoader))


def say_batch(optimizers: Sequence[SecondOrderOptimizer], trainer: pl.Trainer, *arguments: Any) -> None:
    """Give optimizers with an adaptive damping what evaluates this batch; nothing to others.

    Args:
        arguments: of ``training_step``.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, LayeredOptimizer) and optimizer.options.adaptive_damping is not None:
            optimizer.evaluate = evaluator(trainer, *arguments)


def training_step_arguments(module: pl.LightningModule, batch: Any, index: int) -> tuple[Any, ...]:
    """What Lightning gives to ``training_step``: the batch's number only where there is a place for it."""
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

    return (batch, index) if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2) else (batch,)


def evaluator(trainer: pl.Trainer, *arguments: Any) -> Callable[[], Tensor]:
    """The loss of the batch at hand once more, for optimizers that compare it before and after a step: a function that
    runs ``training_step`` on it again, without gradients and without logging."""

    def evaluate() -> Tensor:
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            output = once_more(trainer.lightning_module, trainer.strategy.training_step, *arguments)
        return cast(Tensor, output["loss"] if isinstance(output, dict) else output)

    return evaluate
