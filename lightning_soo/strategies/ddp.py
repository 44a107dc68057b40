"""Replicas: every rank holds the whole model."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from lightning_soo.strategies.mixin import SecondOrderStrategyMixin


class SecondOrderDDPStrategy(SecondOrderStrategyMixin, DDPStrategy):
    """``DDPStrategy`` with second-order training; takes its arguments and those of the mixin."""

    engine = "ddp"
    preconditioners_travel_with_optimizer = True

    def attach_optimizers(self) -> None:
        super().attach_optimizers()
        assert self.lightning_module is not None
        for optimizer in self.second_order_optimizers:
            # names come from a model that outlives the DDP wrapper, which ends with the fit: saving comes after it
            optimizer.remember(self.lightning_module)
