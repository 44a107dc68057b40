"""What every second-order Lightning strategy does, whatever the engine below it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_soo.integrations.trainer import data_workers, say_accumulation, say_batch
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.gathered import GatheredOptimizer
from lightning_soo.optim.takeover import check_method, find_optimizers, take_over
from lightning_soo.strategies.checkpoints import PortableCheckpoints
from lightning_soo.strategies.default_optimizer import build_adamw, check_settings, configured_by_default


class SecondOrderStrategyMixin(PortableCheckpoints):
    """Takes over the optimizers of the module, attaches them to the wrapped model and closes them.

    Args:
        method: ``"shampoo"``, ``"soap"``, ``"sonew"`` or ``"kfac"``; None takes nothing over (second-order optimizers
            are attached all the same).
        options: options of the method, see :class:`lightning_soo.Shampoo`.
        optimizer_options: settings of the AdamW that is built where ``configure_optimizers`` is absent or returns None.
        portable_checkpoints: whether checkpoints that are folders can be loaded by any strategy here at any number of
            ranks; False leaves them to the engine.
        asynchronous_checkpoints: whether these are written while training goes on.
        adopt: whether the checkpoint of an AdamW or SGD is taken: its moments go on, preconditioners start anew.

    Raises:
        ValueError: unknown method, with the nearest name, or a value that is refused.
        TypeError: unknown option, or a setting that AdamW does not have, with the nearest name.
    """

    engine: ClassVar[str | None] = None  # as SecondOrderOptimizer.attach knows it; None is read from the parameters

    def __init__(
        self,
        *args: Any,
        method: str | None = "shampoo",
        options: Mapping[str, Any] | None = None,
        optimizer_options: Mapping[str, Any] | None = None,
        portable_checkpoints: bool = True,
        asynchronous_checkpoints: bool = False,
        adopt: bool = False,
        **kwargs: Any,
    ) -> None:
        check_method(method, options or {})
        check_settings(optimizer_options or {})
        super().__init__(*args, **kwargs)
        self.portable_checkpoints = portable_checkpoints
        self.asynchronous_checkpoints = asynchronous_checkpoints
        self.adopt = adopt
        self.method = method
        self.options = dict(options or {})
        self.optimizer_options = dict(optimizer_options or {})
        self.second_order_optimizers: list[SecondOrderOptimizer] = []

    # the order of a run: connect, (Lightning verifies the module), setup_environment, setup, ..., teardown

    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        if not is_overridden("configure_optimizers", model):  # would be refused before any other hook of ours
            model.__dict__["configure_optimizers"] = self._build_optimizer

    def setup_environment(self) -> None:
        self._forget_placeholder()
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.attach_optimizers()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        with self.default_optimizer():
            super().setup_optimizers(trainer)
        if self.optimizers:  # DeepSpeed has none yet
            self.take_over_optimizers(self.optimizers)
            self.optimizers = self.optimizers  # Lightning's wrappers imitate the class, which has changed

    def teardown(self) -> None:
        self._forget_placeholder()
        for optimizer in self.second_order_optimizers:
            optimizer.close()
        super().teardown()

    def take_over_optimizers(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Convert them in place; what a callback or the user has converted already stays as it is."""
        if self.method is not None:
            for optimizer in find_optimizers(optimizers):
                if isinstance(optimizer, GatheredOptimizer):
                    continue  # no AdamW's place to take, and its callback attaches it
                take_over(optimizer, self.method, dict(self.options), self.lightning_module)
        self.second_order_optimizers = [one for one in optimizers if isinstance(one, SecondOrderOptimizer)]
        for optimizer in self.second_order_optimizers:
            optimizer.adopts = optimizer.adopts or self.adopt  # a callback may have asked for it

    def attach_optimizers(self) -> None:
        """Build the plans for the model as the engine has wrapped it: after ``setup``, before training and loading."""
        for optimizer in self.second_order_optimizers:
            optimizer.attach(self.model, self.engine)

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        say_accumulation(self.second_order_optimizers, self.lightning_module.trainer)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def training_step(self, *arguments: Any, **named: Any) -> Any:
        """With what Lightning gives: the batch, and its number where the module asks for it."""
        assert self.lightning_module is not None
        if torch.is_grad_enabled():  # not the evaluation itself
            say_batch(self.second_order_optimizers, self.lightning_module.trainer, *arguments)
        return super().training_step(*arguments, **named)

    def on_train_start(self) -> None:
        """Only now the Trainer has asked for its loaders, whose processes take cores that workers do not get."""
        assert self.lightning_module is not None
        for optimizer in self.second_order_optimizers:
            optimizer.data_workers = data_workers(self.lightning_module.trainer)
            rank_zero_info(optimizer.plan_table())
        super().on_train_start()

    @contextmanager
    def default_optimizer(self) -> Iterator[None]:
        """Within it the module has a ``configure_optimizers`` that returns an optimizer."""
        assert self.lightning_module is not None
        with configured_by_default(self.lightning_module, self._build_optimizer, self.optimizer_options):
            yield

    def _build_optimizer(self) -> torch.optim.Optimizer:
        assert self.model is not None
        return build_adamw(self.model, self.optimizer_options)

    def _forget_placeholder(self) -> None:
        module = self.lightning_module
        if module is not None and module.__dict__.get("configure_optimizers") == self._build_optimizer:
            del module.__dict__["configure_optimizers"]
