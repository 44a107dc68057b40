"""What every second-order Fabric strategy does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import nn

from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.takeover import check_method, take_over
from lightning_soo.strategies.fabric.checkpoints import FabricCheckpoints


class FabricSecondOrderMixin(FabricCheckpoints):
    """Takes over the optimizers given to ``fabric.setup`` or ``fabric.setup_optimizers`` and attaches them.

    Args:
        method: ``"shampoo"``, ``"soap"``, ``"sonew"`` or ``"kfac"``; None takes nothing over (second-order optimizers
            are attached all the same).
        options: options of the method, see :class:`lightning_soo.Shampoo`.
        portable_checkpoints: whether checkpoints that are folders can be loaded by any strategy here at any number of
            ranks; False leaves them to the engine.
        adopt: whether the state of an AdamW or SGD is taken: its moments go on, preconditioners start anew.

    Raises:
        ValueError: unknown method or option, with the nearest name.
    """

    engine: ClassVar[str | None] = None  # as SecondOrderOptimizer.attach knows it; None is read from the parameters

    def __init__(
        self,
        *args: Any,
        method: str | None = "shampoo",
        options: Mapping[str, Any] | None = None,
        portable_checkpoints: bool = True,
        adopt: bool = False,
        **kwargs: Any,
    ) -> None:
        check_method(method, options or {})
        super().__init__(*args, **kwargs)
        self.portable_checkpoints, self.adopt = portable_checkpoints, adopt
        self.method = method
        self.options = dict(options or {})
        self.second_order_optimizers: list[SecondOrderOptimizer] = []
        self._wrapped: nn.Module | None = None

    def setup_module(self, module: nn.Module) -> Any:
        self._wrapped = super().setup_module(module)
        return self._wrapped

    def setup_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self.take_over_optimizer(optimizer, self._wrapped)
        optimizer = super().setup_optimizer(optimizer)
        self.attach_optimizer(optimizer, self._wrapped)
        return optimizer

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[torch.optim.Optimizer], *args: Any, **kwargs: Any
    ) -> Any:
        for optimizer in optimizers:  # before: DeepSpeed's own optimizer will hide them
            self.take_over_optimizer(optimizer, module)
        prepared = super().setup_module_and_optimizers(module, optimizers, *args, **kwargs)
        for optimizer in optimizers:
            self.attach_optimizer(optimizer, prepared[0])
        return prepared

    def take_over_optimizer(self, optimizer: torch.optim.Optimizer, module: nn.Module | None) -> None:
        """Convert it in place, unless it is second-order already."""
        if self.method is not None:
            take_over(optimizer, self.method, dict(self.options), module)

    def attach_optimizer(self, optimizer: torch.optim.Optimizer, wrapped: nn.Module | None) -> None:
        """Build its plan for the model as the engine has wrapped it, once."""
        if isinstance(optimizer, SecondOrderOptimizer) and optimizer not in self.second_order_optimizers:
            self.second_order_optimizers.append(optimizer)
            optimizer.adopts = optimizer.adopts or self.adopt
            optimizer.attach(wrapped, self.engine)
            rank_zero_info(optimizer.plan_table())

    def close_optimizers(self) -> None:
        """Stop background work of the optimizers; Fabric itself never ends a run."""
        for optimizer in self.second_order_optimizers:
            optimizer.close()

    def teardown(self) -> None:
        self.close_optimizers()
        super().teardown()
