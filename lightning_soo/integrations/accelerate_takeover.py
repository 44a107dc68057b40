"""``Accelerator.prepare`` of this process, taken over where somebody opted in."""

from __future__ import annotations

import functools
import sys
from typing import Any

from lightning_soo.config import Config
from lightning_soo.integrations.accelerate_session import Session


class _Launched:
    """What holds for every Accelerator of this process."""

    everywhere = False
    config: Config | None = None


def install(config: Config | None = None, *, everywhere: bool = False) -> None:
    """From now on ``Accelerator.prepare`` takes optimizers over. Installing twice does nothing more.

    Args:
        config: for all Accelerators of this process; None leaves it to ``SOO_CONFIG`` or to a Trainer's arguments.
        everywhere: whatever any Accelerator prepares; otherwise only where a :class:`Session` was made before.
    """
    from accelerate import Accelerator

    _Launched.everywhere = _Launched.everywhere or everywhere
    _Launched.config = config or _Launched.config
    if hasattr(Accelerator.prepare, "second_order"):
        return
    initialise, prepare_all, prepare_one = Accelerator.__init__, Accelerator.prepare, Accelerator.prepare_optimizer

    @functools.wraps(initialise)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        if "transformers.trainer" in sys.modules:  # whose Trainer is perhaps making this one
            from lightning_soo.integrations.transformers_trainer import install_trainer

            install_trainer()

    @functools.wraps(prepare_all)
    def prepare(self: Any, *objects: Any, **options: Any) -> Any:
        session = _session(self)
        if session is None or session.is_preparing:
            return prepare_all(self, *objects, **options)
        return session.prepare(objects, options)

    @functools.wraps(prepare_one)
    def prepare_optimizer(self: Any, *arguments: Any, **options: Any) -> Any:
        session = _session(self)
        wrapped = prepare_one(self, *arguments, **options)
        if session is not None and not session.is_preparing:  # called by the script itself
            session.adopt()
        return wrapped

    prepare.second_order = True  # type: ignore[attr-defined]
    Accelerator.__init__, Accelerator.prepare, Accelerator.prepare_optimizer = init, prepare, prepare_optimizer


def _session(accelerator: Any) -> Session | None:
    if _Launched.everywhere:
        return Session.of(accelerator, _Launched.config)
    session: Session | None = vars(accelerator).get("_second_order")
    return session
