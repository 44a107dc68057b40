"""One callback that lets a Trainer train by trust-region Newton-CG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_soo.callbacks.base import Callback
from lightning_soo.callbacks.options import keyword_types_of
from lightning_soo.integrations.trainer import trust_region_optimizers
from lightning_soo.integrations.trainer_micro_batches import MicroBatches
from lightning_soo.integrations.trainer_refusals import refuse_trainer
from lightning_soo.optim.takeover import find_optimizers
from lightning_soo.optim.trust_region import TrustRegionNewtonCG

if TYPE_CHECKING:
    import lightning.pytorch as pl


class TrustRegion(Callback):
    """Trains by :class:`lightning_soo.TrustRegionNewtonCG` in place of the optimizer of ``configure_optimizers``.

    Of that optimizer the parameter groups stay; its settings, weight decay among them, and its schedulers are not used.
    Without one, all trainable parameters are trained. With ``accumulate_grad_batches=n`` a step has n micro-batches,
    weighted by their numbers of examples. ``training_step`` runs again several times in every step, on the same batch
    and with the same random numbers, and is logged once; for ``curvature="gauss_newton"`` it returns
    ``{"loss": ..., "outputs": ...}``.

    Args:
        options: of :class:`lightning_soo.TrustRegionNewtonCG`. Without any, one that ``configure_optimizers`` returns
            is taken as it is.

    Raises:
        TypeError: unknown option, with the nearest name.
        ValueError: a value that is refused.
    """

    def __init__(self, **options: Any) -> None:
        TrustRegionNewtonCG([nn.Parameter(torch.zeros(1))], **options)
        self.options = options
        self._wrapped: Any = None
        self._before: Any = None
        self._micro_batches: MicroBatches | None = None

    __init__.__annotations__["options"] = keyword_types_of([TrustRegionNewtonCG])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """
        Raises:
            TypeError, ValueError: a Trainer or module that this cannot train, see :func:`refuse_trainer`.
        """
        if stage != "fit":
            return
        refuse_trainer(trainer, pl_module, type(self).__name__)
        if sum(isinstance(callback, TrustRegion) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("the Trainer has two callbacks TrustRegion: one decides how to train")
        self._before = vars(pl_module).get("configure_optimizers")
        original = pl_module.configure_optimizers
        owner = next(kind for kind in type(pl_module).__mro__ if "configure_optimizers" in vars(kind))
        defined = self._before is not None or owner.__name__ != "LightningModule"

        def configure_optimizers() -> TrustRegionNewtonCG:
            return self.replace(original() if defined else None, pl_module)

        self._wrapped = pl_module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]

    def replace(self, configured: Any, pl_module: pl.LightningModule) -> TrustRegionNewtonCG:
        """The optimizer that trains, in place of what ``configure_optimizers`` has returned.

        Raises:
            ValueError: several optimizers, or one that has options already.
        """
        found = list(find_optimizers(configured))
        if len(found) > 1:
            names = ", ".join(type(optimizer).__name__ for optimizer in found)
            raise ValueError(f"TrustRegion trains by one optimizer, and configure_optimizers returned {names}")
        if not found:
            trainable = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            return TrustRegionNewtonCG(trainable, **self.options)
        (first,) = found
        name = type(first).__name__
        if isinstance(first, TrustRegionNewtonCG):
            if self.options:
                given = ", ".join(self.options)
                raise ValueError(
                    f"configure_optimizers returned {name} already, and TrustRegion was given {given}: give the "
                    "options to one of them"
                )
            return first
        rank_zero_info(f"TrustRegionNewtonCG trains in place of {name}, whose settings and schedulers are not used")
        kept = ("params", "param_names")
        groups = [{key: group[key] for key in kept if key in group} for group in first.param_groups]
        return TrustRegionNewtonCG(groups, **self.options)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read how parameters are sharded, as the model is wrapped now, before a checkpoint is loaded."""
        (optimizer,) = trust_region_optimizers(trainer)
        optimizer.attach(trainer.strategy.model, None if trainer.world_size > 1 else "single")
        self._micro_batches = MicroBatches(trainer, optimizer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that was left in the middle of an accumulation has left no gradients either."""
        for optimizer in trust_region_optimizers(trainer):
            optimizer.abandon()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning does not call ``teardown`` after an exception, Ctrl-C or SIGTERM."""
        self._release(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._release(pl_module)

    def _release(self, pl_module: pl.LightningModule) -> None:
        if self._micro_batches is not None:
            self._micro_batches.close()
        if self._wrapped is not None and vars(pl_module).get("configure_optimizers") is self._wrapped:
            del pl_module.configure_optimizers
            if self._before is not None:
                pl_module.configure_optimizers = self._before  # type: ignore[method-assign]
        self._micro_batches = self._wrapped = self._before = None
