"""What a pass of a model is, whichever of its modules the user calls, and how many examples it has."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from lightning_soo.capture.registry import tensors
from lightning_soo.capture.uses import Use


@dataclass(eq=False)
class Pass:
    """Everything called between two backward passes.

    Attributes:
        batch: its examples; 0 while no module was given a tensor.
        is_counted: a backward pass has come by.
        is_observed: its outputs have been differentiated by the recorder itself.
        uses: of its modules, each with where its gradient is to be had, until then.
    """

    batch: int
    is_counted: bool = False
    is_observed: bool = False
    uses: list[tuple[GradientEdge, Use]] = field(default_factory=list)


class Passes:
    """The pass that goes on now.

    The first module called after a backward pass begins one, and the leading dimension of its first tensor is the
    number of examples: where its arguments hide them, of the first module inside it that is given one. What is called
    until the next backward pass belongs to it: two views of the same examples, an encoder and then its decoder. A pass
    whose graph has been dropped is over as well.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._held: Pass | None = None  # while nothing in the graph holds it
        self._reference: weakref.ref[Pass] | None = None
        self._outermost: nn.Module | None = None
        # of a call without gradients, which reentrant checkpointing may turn out to have made
        self._possible: int | None = None

    def begin(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before the forward of any module."""
        if is_in_backward():
            return
        current = self._latest()
        if current is not None and not current.is_counted:
            current.batch = current.batch or _leading_dimension(positional, named)
            return
        if torch.is_grad_enabled():
            self._start(_leading_dimension(positional, named))
            self._outermost = module
        elif self._outermost is None or self._possible == 0:
            self._possible = _leading_dimension(positional, named)
            self._outermost = self._outermost or module

    def end(self, module: nn.Module) -> bool:
        """After the forward of any module: whether it is the one that began the pass."""
        if module is not self._outermost or is_in_backward():
            return False
        self._outermost = None
        if self._held is not None and not self._held.uses:
            batch, self._held = self._held.batch, None
            if self._latest() is None:  # no layer was seen: all may lie inside reentrant checkpoints
                self._possible = batch
        return True

    def current(self) -> Pass | None:
        """The pass of a use that is to be recorded."""
        latest = self._latest()
        if self._possible is not None and (latest is None or latest.is_counted):
            latest = self._start(self._possible)
        return latest

    def is_over(self) -> bool:
        """Whether what is called now begins a pass."""
        latest = self._latest()
        return (latest is None or latest.is_counted) and not is_in_backward()

    def has_uses(self) -> bool:
        """Whether layers were called whose gradients nobody has asked for yet."""
        latest = self._latest()
        return latest is not None and bool(latest.uses)

    def count(self, current: Pass) -> bool:
        """A gradient of it arrives: whether it is the first."""
        # what activation checkpointing calls again is of this one, also where another has begun
        self._held, self._reference = current, weakref.ref(current)
        is_first, current.is_counted = not current.is_counted, True
        return is_first

    def _latest(self) -> Pass | None:
        return self._held or (self._reference() if self._reference is not None else None)

    def _start(self, batch: int) -> Pass:
        self._held = Pass(batch=batch)
        self._reference, self._possible = weakref.ref(self._held), None
        return self._held


def _leading_dimension(positional: tuple[Any, ...], named: dict[str, Any]) -> int:
    tensor = next((tensor for tensor in tensors((positional, named)) if tensor.ndim > 0), None)
    return tensor.shape[0] if tensor is not None else 0


def is_in_backward() -> bool:
    """Whether autograd is running: activation checkpointing calls modules again there."""
    return torch._C._current_graph_task_id() != -1


def is_repeated() -> bool:
    """Whether this call only makes anew what was saved: its outputs have no gradients of their own.

    Not where checkpointing is reentrant: there the first call has no graph, and this one is differentiated.
    """
    if not is_in_backward():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")
