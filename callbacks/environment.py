"""The callback of the environment variable ``SOO_LIGHTNING``; :mod:`lightning_soo.autoload` asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

import torch

from lightning_soo.autoload import ENVIRONMENT_VARIABLE
from lightning_soo.callbacks.second_order import SecondOrder
from lightning_soo.config import load_config
from lightning_soo.integrations.trainer import is_ours
from lightning_soo.optim.base import SecondOrderOptimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl


class SecondOrderByEnvironment(SecondOrder):
    """:class:`SecondOrder` with what the variable says; it has to be the only one to say it.

    Raises:
        ValueError: a configuration that is refused.
        FileNotFoundError: the file is missing.
    """

    def __init__(self) -> None:
        config = load_config(variable=ENVIRONMENT_VARIABLE)
        super().__init__(config=config)
        self.source = config.source
        self._converted: WeakSet[torch.optim.Optimizer] = WeakSet()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """
        Raises:
            ValueError: a callback or the strategy takes over too.
        """
        if stage == "fit":
            others = [one for one in trainer.callbacks if isinstance(one, SecondOrder) and one is not self]  # type: ignore[attr-defined]
            if others:
                raise self._twice("the Trainer has the callback SecondOrder as well", "drop the callback")
            if is_ours(trainer.strategy) and trainer.strategy.method is not None:  # type: ignore[attr-defined]
                name = type(trainer.strategy).__name__
                raise self._twice(f"{name} takes over too", f"give it method=None: {name}(method=None)")
        super().setup(trainer, pl_module, stage)

    def take_over(self, optimizer: torch.optim.Optimizer, pl_module: pl.LightningModule) -> None:
        """
        Raises:
            ValueError: it is second-order already.
        """
        if isinstance(optimizer, SecondOrderOptimizer) and optimizer not in self._converted:
            name = type(optimizer).__name__
            raise self._twice(f"configure_optimizers returns {name} already", "return an AdamW")
        super().take_over(optimizer, pl_module)
        self._converted.add(optimizer)

    def _twice(self, what: str, remedy: str) -> ValueError:
        return ValueError(f"{self.source}: {what}: opt in once. Unset {ENVIRONMENT_VARIABLE}, or {remedy}")
