"""What a Transformers Trainer needs so that its optimizer is a second-order one; imports transformers."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback

from lightning_soo.config import ENVIRONMENT_VARIABLE, Config, load_config
from lightning_soo.integrations.accelerate_session import Session
from lightning_soo.integrations.session import innermost
from lightning_soo.integrations.transformers import SecondOrderFactory
from lightning_soo.integrations.transformers_arguments import read_optim_args, refuse_optimizer
from lightning_soo.integrations.transformers_checkpoints import install_checkpoints
from lightning_soo.integrations.transformers_losses import LossDivisor
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.layered import LayeredOptimizer
from lightning_soo.optim.takeover import METHODS


def install_trainer() -> None:
    """Let every Trainer that opts in, by its arguments or by ``SOO_CONFIG``, train to second order; once."""
    if hasattr(Trainer.create_optimizer, "second_order"):
        return
    create = Trainer.create_optimizer

    @functools.wraps(create)
    def create_optimizer(self: Any, *arguments: Any, **options: Any) -> Any:
        config, rest = configuration_of(self)
        if config is not None and self.optimizer is None and not _has_own_class(self):
            refuse_optimizer(self.args)
        with _as_the_trainer_knows_it(self, rest):
            optimizer = create(self, *arguments, **options)
        if config is not None or isinstance(innermost(optimizer), SecondOrderOptimizer):
            _bind(self, Session.of(self.accelerator, config))
        return optimizer

    create_optimizer.second_order = True  # type: ignore[attr-defined]
    Trainer.create_optimizer = create_optimizer
    install_checkpoints(_asks, _adopts)


def configuration_of(trainer: Any) -> tuple[Config | None, str | None]:
    """What a Trainer is asked for, by whichever door, and its ``optim_args`` without it.

    Raises:
        ValueError: two doors that disagree, or a configuration that is refused.
    """
    from_arguments, rest = read_optim_args(trainer.args.optim_args, str(trainer.args.optim.value))
    pair = trainer.optimizer_cls_and_kwargs
    from_code = pair[1]["config"] if pair is not None and pair[0] is SecondOrderFactory else None
    from_environment = load_config() if os.environ.get(ENVIRONMENT_VARIABLE) else None
    found = [config for config in (from_code, from_arguments, from_environment) if config is not None]
    for other in found[1:]:
        if other != found[0]:
            raise ValueError(
                f"two configurations for one Trainer: {found[0].source} and {other.source}. Opt in once: by "
                f"optimizer_cls_and_kwargs, by optim_args, or by {ENVIRONMENT_VARIABLE}"
            )
    return (found[0] if found else None), rest


class SecondOrderCallback(TrainerCallback):  # type: ignore[misc]
    """Gives ``diagnostics()`` to ``Trainer.log`` every ``monitor`` steps, and stops background work at the end."""

    def __init__(self, trainer: Any, session: Session) -> None:
        self._trainer = weakref.ref(trainer)
        self.session = session

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        interval = self.session.config.monitor if self.session.config is not None else None
        trainer = self._trainer()
        if not interval or trainer is None or state.global_step % interval:
            return
        should_log = control.should_log
        for optimizer in self.session.optimizers:
            trainer.log(self.session.figures(optimizer))
        control.should_log = should_log  # which Trainer.log takes as done: the loss would not be logged

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for optimizer in self.session.optimizers:
            optimizer.close()
        _unbind(self.session)


def _has_own_class(trainer: Any) -> bool:
    pair = trainer.optimizer_cls_and_kwargs
    return pair is not None and pair[0] is not SecondOrderFactory


@contextmanager
def _as_the_trainer_knows_it(trainer: Any, optim_args: str | None) -> Iterator[None]:
    """Without our factory and our part of ``optim_args``: it builds the AdamW of its arguments."""
    pair, given = trainer.optimizer_cls_and_kwargs, trainer.args.optim_args
    if not _has_own_class(trainer):
        trainer.optimizer_cls_and_kwargs = None
    trainer.args.optim_args = optim_args
    try:
        yield
    finally:
        trainer.optimizer_cls_and_kwargs, trainer.args.optim_args = pair, given


def _bind(trainer: Any, session: Session) -> None:
    """What the session cannot see from Accelerate: what losses are divided by, and where metrics go."""
    _unbind(session)
    method = session.config.method if session.config is not None else type(innermost(trainer.optimizer)).method
    if issubclass(METHODS[method], LayeredOptimizer):
        session.loss_divisor = LossDivisor(trainer, trainer.model)
    callbacks = [one for one in trainer.callback_handler.callbacks if isinstance(one, SecondOrderCallback)]
    if not any(one.session is session for one in callbacks):
        for one in callbacks:  # of an Accelerator that a search for hyperparameters has replaced
            trainer.remove_callback(one)
        trainer.add_callback(SecondOrderCallback(trainer, session))


def _unbind(session: Session) -> None:
    if isinstance(session.loss_divisor, LossDivisor):
        session.loss_divisor.close()
    session.loss_divisor = None


def _adopts(trainer: Any) -> bool:
    """Whether it takes the checkpoint of a first-order run."""
    config = configuration_of(trainer)[0]
    return bool(config is not None and config.adopt) or bool(getattr(innermost(trainer.optimizer), "adopts", False))


def _asks(trainer: Any) -> bool:
    """Whether its optimizer is, or will be, a second-order one."""
    own = trainer.optimizer_cls_and_kwargs[0] if _has_own_class(trainer) else None
    is_own = isinstance(own, type) and issubclass(own, SecondOrderOptimizer)
    is_there = isinstance(innermost(trainer.optimizer), SecondOrderOptimizer)
    return is_own or is_there or configuration_of(trainer)[0] is not None
