"""Figures about the preconditioners in whatever logger the Trainer has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_soo.callbacks.base import Callback
from lightning_soo.integrations.trainer import monitored_optimizers

if TYPE_CHECKING:
    import lightning.pytorch as pl


class PreconditionerMonitor(Callback):
    """Logs condition number, root residual, staleness, refresh and waiting seconds, refreshes in flight, restarts of
    workers, graft ratio and the preconditioned share. The progress bar shows ``refresh_wait`` (seconds since the last
    record), and only after training had to wait for a refresh that was to be ready. Of
    :class:`lightning_soo.TrustRegionNewtonCG` it logs radius, ratio of actual to predicted reduction, norms, products
    and propagations.

    Args:
        every_n_steps: optimizer steps between two records; None is the Trainer's ``log_every_n_steps``.
        prefix: of the metric names.
    """

    def __init__(self, every_n_steps: int | None = None, prefix: str = "second_order/") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be at least 1")
        self.every_n_steps = every_n_steps
        self.prefix = prefix
        self._waited, self._shown = 0.0, False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        interval = self.every_n_steps or trainer.log_every_n_steps
        if not interval or trainer.global_step == 0 or trainer.global_step % interval:
            return
        optimizers = monitored_optimizers(trainer)
        for index, optimizer in enumerate(optimizers):
            middle = f"{index}/" if len(optimizers) > 1 else ""
            figures = {f"{self.prefix}{middle}{name}": value for name, value in optimizer.diagnostics().items()}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)
        waited = sum(optimizer.diagnostics().get("refresh_wait_seconds", 0.0) for optimizer in optimizers)
        if waited > self._waited + 0.01 or self._shown:
            pl_module.log("refresh_wait", waited - self._waited, prog_bar=True, logger=False)
            self._shown, self._waited = True, waited
