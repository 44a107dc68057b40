"""Figures about the preconditioners in whatever logger the Trainer has."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning_soo.callbacks.second_order import second_order_optimizers


class PreconditionerMonitor(pl.Callback):
    """Logs condition number, root residual, staleness, refresh seconds, graft ratio and the preconditioned share.

    Args:
        every_n_steps: optimizer steps between two records; None is the Trainer's ``log_every_n_steps``.
        prefix: of the metric names.
    """

    def __init__(self, every_n_steps: int | None = None, prefix: str = "second_order/") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self.prefix = prefix

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        interval = self.every_n_steps or trainer.log_every_n_steps
        if not interval or trainer.global_step == 0 or trainer.global_step % interval:
            return
        optimizers = second_order_optimizers(trainer)
        for index, optimizer in enumerate(optimizers):
            middle = f"{index}/" if len(optimizers) > 1 else ""
            figures = {f"{self.prefix}{middle}{name}": value for name, value in optimizer.diagnostics().items()}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)
