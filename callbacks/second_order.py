"""One callback that gives a Trainer second-order training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from lightning_soo.checkpoint.preconditioners import (
    PRECONDITIONERS,
    collect_preconditioners,
    restore_preconditioners,
)
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.takeover import check_method, find_optimizers, take_over
from lightning_soo.strategies.evaluation import say_batch
from lightning_soo.strategies.mixin import SecondOrderStrategyMixin, data_workers, say_accumulation


class SecondOrder(pl.Callback):
    """Takes over the AdamW, Adam or SGD that ``configure_optimizers`` returns; learning rate, decay, parameter groups
    and schedulers stay as they are.

    Args:
        method: ``"shampoo"``, ``"soap"``, ``"sonew"`` or ``"kfac"``.
        options: options of the optimizer, see :class:`lightning_soo.Shampoo`, ``SOAP``, ``SONew`` and ``KFAC``.

    Raises:
        ValueError: unknown method or option, with the nearest name.
    """

    def __init__(self, method: str = "shampoo", **options: Any) -> None:
        check_method(method, options)
        self.method = method
        self.options = options
        self._wrapped: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        original = pl_module.configure_optimizers
        if stage != "fit" or hasattr(original, "second_order"):  # a second callback: one conversion
            return

        def configure_optimizers() -> Any:
            configured = original()
            for optimizer in find_optimizers(configured):
                take_over(optimizer, self.method, dict(self.options), pl_module)
            return configured

        configure_optimizers.second_order = pl_module.__dict__.get("configure_optimizers")  # type: ignore[attr-defined]
        self._wrapped = configure_optimizers
        pl_module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the plan for the model as it is wrapped now, before a checkpoint is loaded."""
        found = second_order_optimizers(trainer)
        if not found:
            raise RuntimeError("SecondOrder found no optimizer to take over: configure_optimizers returned none")
        if isinstance(trainer.strategy, SecondOrderStrategyMixin):
            return  # it has attached them
        for optimizer in found:
            optimizer.attach(trainer.strategy.model, None if trainer.world_size > 1 else "single")
            if isinstance(trainer.strategy, DDPStrategy):
                optimizer.remember(pl_module)  # which outlives the wrapper

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Only now the Trainer has asked a data module for its loaders, whose processes take cores."""
        if isinstance(trainer.strategy, SecondOrderStrategyMixin):
            return
        for optimizer in second_order_optimizers(trainer):
            optimizer.data_workers = data_workers(trainer)
            rank_zero_info(optimizer.plan_table())

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        found = second_order_optimizers(trainer)
        say_accumulation(found, trainer)
        say_batch(found, trainer, batch, index)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather what other ranks hold; Lightning calls this on every rank, after it asked for optimizer states."""
        states = checkpoint.get("optimizer_states")
        if states is None or trainer.world_size == 1 or isinstance(trainer.strategy, SecondOrderStrategyMixin):
            return
        found = second_order_optimizers(trainer)
        if any(optimizer.is_sharded for optimizer in found):
            checkpoint[PRECONDITIONERS] = collect_preconditioners(found, trainer.is_global_zero)
            return
        for index, optimizer in enumerate(trainer.optimizers):
            if isinstance(optimizer, SecondOrderOptimizer):
                optimizer.consolidate(to=0)
                states[index] = trainer.strategy.optimizer_state(optimizer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Engines that shard the state have loaded their part by now; the rest is ours."""
        found = second_order_optimizers(trainer)
        if isinstance(trainer.strategy, SecondOrderStrategyMixin) or not any(one.is_sharded for one in found):
            return
        restore_preconditioners(found, trainer.strategy.broadcast(checkpoint.get(PRECONDITIONERS)))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the workers: Lightning does not call ``teardown`` after an exception, Ctrl-C or SIGTERM."""
        self._release(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release(trainer, pl_module)

    def _release(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._wrapped is not None and pl_module.__dict__.get("configure_optimizers") is self._wrapped:
            del pl_module.__dict__["configure_optimizers"]
            if self._wrapped.second_order is not None:  # the user had set it on the instance
                pl_module.__dict__["configure_optimizers"] = self._wrapped.second_order
        self._wrapped = None
        for optimizer in second_order_optimizers(trainer):
            optimizer.close()


def second_order_optimizers(trainer: pl.Trainer) -> list[SecondOrderOptimizer]:
    """The trainer's optimizers that are ours, or those inside an engine's own optimizer."""
    if isinstance(trainer.strategy, SecondOrderStrategyMixin):
        return trainer.strategy.second_order_optimizers
    inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]  # DeepSpeed wraps it
    return [optimizer for optimizer in inner if isinstance(optimizer, SecondOrderOptimizer)]
