"""The loss of the batch at hand once more, for K-FAC's adaptive damping in a loop of Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.layered import LayeredOptimizer


def adapts_damping(optimizer: SecondOrderOptimizer) -> bool:
    """Whether it asks for the loss again."""
    return isinstance(optimizer, LayeredOptimizer) and optimizer.options.adaptive_damping is not None


class ModelLoss:
    """What a model that returns its own loss, as those of Transformers do, was last called with.

    Args:
        model: as Accelerate has prepared it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._last: Tensor | None = None
        self._handle = model.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, model: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled():
            self._call, self._last = (args, options), loss_in(output)

    def take(self, loss: Any) -> bool:
        """Whether ``loss``, of which gradients are taken, is what the last call returned."""
        found, self._last = self._last is not None and self._last is loss, None
        return found

    def __call__(self) -> Tensor:
        args, options = self._call
        loss = loss_in(self._model(*args, **options))
        assert loss is not None
        return loss

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
        self._call, self._last = ((), {}), None


def loss_in(output: Any) -> Tensor | None:
    """The loss that a model has returned: its ``loss``, the first of several outputs, or the output itself."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif hasattr(output, "loss"):
        output = output.loss
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) and output.ndim == 0 else None
