"""One callback that gives a Trainer second-order training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.nn.parallel import DistributedDataParallel

from lightning_soo.callbacks.base import Callback
from lightning_soo.callbacks.monitor import PreconditionerMonitor
from lightning_soo.callbacks.options import keyword_types
from lightning_soo.checkpoint.preconditioners import (
    PRECONDITIONERS,
    collect_preconditioners,
    restore_preconditioners,
)
from lightning_soo.config import Config, Source, load_config
from lightning_soo.integrations.trainer import (
    data_workers,
    is_ours,
    say_accumulation,
    say_batch,
    second_order_optimizers,
    training_step_arguments,
)
from lightning_soo.integrations.trainer_checkpoints import CheckpointGuard
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.takeover import check_method, find_optimizers, take_over

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SecondOrder(Callback):
    """Takes over the AdamW, Adam or SGD that ``configure_optimizers`` returns; learning rate, decay, parameter groups
    and schedulers stay as they are.

    Args:
        method: ``"shampoo"`` (where neither this nor ``config`` says otherwise), ``"soap"``, ``"sonew"`` or ``"kfac"``.
        config: what :func:`lightning_soo.load_config` takes, such as the name of a file; ``method`` and ``options``
            that are given here win. With ``monitor`` it logs as :class:`PreconditionerMonitor` does.
        adopt: whether the checkpoint of an AdamW or SGD is taken by ``fit(ckpt_path=...)``: its moments go on,
            preconditioners start anew.
        options: options of the optimizer, see :class:`lightning_soo.Shampoo`, ``SOAP``, ``SONew`` and ``KFAC``.

    Raises:
        TypeError: unknown option, with the nearest name.
        ValueError: unknown method, a value that is refused, or a configuration that is.
    """

    def __init__(
        self, method: str | None = None, config: Source | Config = None, adopt: bool = False, **options: Any
    ) -> None:
        monitor = None
        if config is not None:
            read = config if isinstance(config, Config) else load_config(config)
            kept = read.options if method in (None, read.method) else {}
            method, options, monitor = method or read.method, {**kept, **options}, read.monitor
            adopt = adopt or read.adopt
        check_method(method or "shampoo", options)
        self.method = method or "shampoo"
        self.options = options
        self._monitor = PreconditionerMonitor(monitor) if monitor is not None else None
        self.adopt = adopt
        self._wrapped: Any = None
        self._guard: CheckpointGuard | None = None

    __init__.__annotations__["options"] = keyword_types()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not is_ours(trainer.strategy) and self._guard is None:
            self._guard = CheckpointGuard(trainer, pl_module, fitting=stage == "fit")
        original = pl_module.configure_optimizers
        if stage != "fit" or hasattr(original, "second_order"):  # a second callback: one conversion
            return

        def configure_optimizers() -> Any:
            configured = original()
            for optimizer in find_optimizers(configured):
                self.take_over(optimizer, pl_module)
            return configured

        configure_optimizers.second_order = pl_module.__dict__.get("configure_optimizers")  # type: ignore[attr-defined]
        self._wrapped = configure_optimizers
        pl_module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def take_over(self, optimizer: torch.optim.Optimizer, pl_module: pl.LightningModule) -> None:
        """Convert one optimizer in place, unless it is second-order already."""
        found = take_over(optimizer, self.method, dict(self.options), pl_module)
        found.adopts = found.adopts or self.adopt

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the plan for the model as it is wrapped now, before a checkpoint is loaded."""
        found = second_order_optimizers(trainer)
        if not found:
            raise RuntimeError("SecondOrder found no optimizer to take over: configure_optimizers returned none")
        if is_ours(trainer.strategy):
            return  # it has attached them
        for optimizer in found:
            optimizer.attach(trainer.strategy.model, None if trainer.world_size > 1 else "single")
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                optimizer.remember(pl_module)  # which outlives the wrapper
        if self._guard is not None:
            self._guard.finish(found)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Only now the Trainer has asked a data module for its loaders, whose processes take cores."""
        if self._guard is not None:
            self._guard.release()
            self._guard = None
        if is_ours(trainer.strategy):
            return
        for optimizer in second_order_optimizers(trainer):
            optimizer.data_workers = data_workers(trainer)
            rank_zero_info(optimizer.plan_table())

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        found = second_order_optimizers(trainer)
        say_accumulation(found, trainer)
        say_batch(found, trainer, *training_step_arguments(pl_module, batch, index))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._monitor is not None:
            self._monitor.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather what other ranks hold; Lightning calls this on every rank, after it asked for optimizer states."""
        states = checkpoint.get("optimizer_states")
        if states is None or trainer.world_size == 1 or is_ours(trainer.strategy):
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
        if is_ours(trainer.strategy) or not any(one.is_sharded for one in found):
            return
        restore_preconditioners(found, trainer.strategy.broadcast(checkpoint.get(PRECONDITIONERS)))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the workers: Lightning does not call ``teardown`` after an exception, Ctrl-C or SIGTERM."""
        if self._guard is not None:
            self._guard.undo()
            self._guard = None
        self._release(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._guard is not None:
            self._guard.release()
            self._guard = None
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
