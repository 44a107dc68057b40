"""What a Transformers Trainer divides losses by: some models take ``num_items_in_batch`` and ignore it."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


class LossDivisor:
    """Of one Trainer; call it at a step.

    A model that divides the sum over its labels by ``num_items_in_batch``, over all micro-batches and processes, has a
    loss that is as much smaller as a mean that is divided by the number of micro-batches. A model that is given the
    number and takes a mean all the same has one that is divided by nothing, and multiplied by the number of processes.

    Args:
        trainer: a ``transformers.Trainer``, with its model as it is before an engine wraps it.
    """

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._trainer = weakref.ref(trainer)
        self._is_given = self._is_used = False
        get_base: Any = getattr(model, "get_base_model", None)  # PEFT's
        model = get_base() if get_base is not None else model
        parts = [part for part in model.modules() if hasattr(type(part), "loss_function")]
        # where the model reads the number itself, or is not Transformers' own, it is taken to use it
        self._is_known = bool(parts) and not any(_reads_number(part) for part in parts)
        self._releases: list[Callable[[], None]] = []
        if self._is_known:
            handle = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            self._releases.append(handle.remove)
            for part in parts:
                self._watch(part)

    def close(self) -> None:
        """Leave the model as it was."""
        for release in self._releases:
            release()
        self._releases.clear()

    def __call__(self) -> float:
        trainer = self._trainer()
        assert trainer is not None
        if self._is_known and self._is_given and not self._is_used and not self._is_computed_by(trainer):
            return 1.0 / float(trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1)
        return float(getattr(trainer, "current_gradient_accumulation_steps", 1))

    @staticmethod
    def _is_computed_by(trainer: Any) -> bool:
        """Whether the Trainer, and not the model, makes the loss."""
        return trainer.compute_loss_func is not None or trainer.label_smoother is not None

    def _before_forward(self, model: nn.Module, positional: Any, named: dict[str, Any]) -> None:
        if model.training:
            self._is_given, self._is_used = named.get("num_items_in_batch") is not None, False

    def _watch(self, part: Any) -> None:
        function, own = part.loss_function, vars(part).get("_loss_function")

        @functools.wraps(function)
        def loss_function(*arguments: Any, **named: Any) -> Any:
            self._is_used = self._is_used or named.get("num_items_in_batch") is not None
            return function(*arguments, **named)

        def release() -> None:
            if own is not None:
                part.loss_function = own
            else:
                del part._loss_function  # it follows its configuration again

        part.loss_function = loss_function
        self._releases.append(release)


def _reads_number(part: nn.Module) -> bool:
    try:
        return "num_items_in_batch" in inspect.getsource(type(part).forward)
    except (OSError, TypeError):
        return True
