"""What every front door does with its optimizers, from being taken over to each step."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch

from lightning_soo.config import ENVIRONMENT_VARIABLE, Config, load_config
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.layered import LayeredOptimizer
from lightning_soo.optim.takeover import take_over

PREFIX = "second_order/"


class OptimizerSession:
    """Optimizers of one trainer; a door says in a subclass what it knows of the trainer.

    Args:
        config: None takes nothing over; second-order optimizers are attached all the same.
    """

    taken_over = 0  # optimizers of this process, over all sessions

    def __init__(self, config: Config | None) -> None:
        self.config = config
        self._known: WeakSet[SecondOrderOptimizer] = WeakSet()  # taken over here, or the user's own
        self._attached: WeakSet[SecondOrderOptimizer] = WeakSet()
        self._started: WeakSet[SecondOrderOptimizer] = WeakSet()
        self._recorded: WeakKeyDictionary[SecondOrderOptimizer, int] = WeakKeyDictionary()  # at which step

    @property
    def optimizers(self) -> list[SecondOrderOptimizer]:
        """The second-order ones that the trainer has now."""
        raise NotImplementedError

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        raise NotImplementedError

    @property
    def is_recording(self) -> bool:
        """Whether the trainer has anything that figures can be given to."""
        raise NotImplementedError

    def attach(self, optimizer: SecondOrderOptimizer, *, must: bool) -> None:
        """Build its plan for the model as the trainer has wrapped it, which ``must`` be possible now. Collective."""
        raise NotImplementedError

    def accumulation(self) -> tuple[float, Any]:
        """By how many micro-batches the loop divides the loss, and the gradient scaler, if any."""
        raise NotImplementedError

    def data_workers(self) -> int:
        """Data loading processes of this rank."""
        raise NotImplementedError

    def remarks(self) -> str:
        """What belongs below the plan, from a new line on."""
        return ""

    def record(self, figures: dict[str, float], step: int) -> None:
        """Give figures to the trainer's trackers."""
        raise NotImplementedError

    def take_over(self, optimizer: torch.optim.Optimizer) -> SecondOrderOptimizer:
        """Make it a second-order one, in place; what is one already is only watched.

        Raises:
            ValueError: no configuration, or one too many.
            TypeError: an optimizer that cannot be taken over.
        """
        if optimizer in self._known:
            assert isinstance(optimizer, SecondOrderOptimizer)
            return optimizer
        self.check(optimizer)
        if not isinstance(optimizer, SecondOrderOptimizer):
            assert self.config is not None
            optimizer = take_over(optimizer, self.config.method, dict(self.config.options))
            optimizer.adopts = self.config.adopt
        self._known.add(optimizer)
        OptimizerSession.taken_over += 1
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        return optimizer

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """
        Raises:
            ValueError: no configuration, or one too many.
        """
        if optimizer in self._known:
            return
        if not isinstance(optimizer, SecondOrderOptimizer):
            self.config = self.config or load_config()  # which says what is missing
        elif self.config is not None:
            raise ValueError(
                f"the optimizer is {type(optimizer).__name__} already, and {self.config.source} asks for "
                f"{self.config.method!r} as well: opt in once. Build an AdamW in the script, or drop the "
                f"configuration (unset {ENVIRONMENT_VARIABLE})"
            )

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if optimizer not in self._attached:
            self.attach(optimizer, must=True)
        if isinstance(optimizer, LayeredOptimizer):
            optimizer.accumulate(*self.accumulation())
        if optimizer not in self._started:
            self._started.add(optimizer)
            optimizer.data_workers = self.data_workers()
            if self.is_first:
                print(optimizer.plan_table() + self.remarks(), flush=True)

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        interval = self.config.monitor if self.config is not None else None
        if not interval or not self.is_recording or not optimizer.steps or optimizer.steps % interval:
            return
        if self._recorded.get(optimizer) == optimizer.steps:
            return  # a later part of the same step, or a step that was skipped
        self._recorded[optimizer] = optimizer.steps
        self.record(self.figures(optimizer), optimizer.steps)

    def figures(self, optimizer: SecondOrderOptimizer) -> dict[str, float]:
        """Its ``diagnostics()`` under the names that trackers get."""
        optimizers = self.optimizers
        middle = f"{optimizers.index(optimizer)}/" if len(optimizers) > 1 else ""
        return {f"{PREFIX}{middle}{name}": value for name, value in optimizer.diagnostics().items()}


def innermost(optimizer: Any) -> Any:
    """What an engine's own optimizer, and wrappers around it, step in the end."""
    while not isinstance(optimizer, SecondOrderOptimizer) and getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer
