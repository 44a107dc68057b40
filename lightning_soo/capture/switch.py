"""What is hung on a module: a function that a copy of the module does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle


class Switch:
    """Calls a function until it is turned off.

    Modules are copied with their hooks: by ``copy.deepcopy`` for an average of the weights, by ``pickle`` and
    ``torch.save``. A copy of this one is off, so the passes of a copied module are not recorded.

    ``torch.compile`` breaks its graph at the function instead of tracing it: the gradient of a value inside a compiled
    graph is nobody's to see.
    """

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    @_disable_dynamo  # torch.compiler.disable, but for an import of two seconds before there is a first call
    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._function(*positional, **named) if self._function is not None else None

    def turn_off(self) -> None:
        """For good, also where compiled code kept it."""
        self._function = None

    def __reduce__(self) -> tuple[type[Switch], tuple[()]]:
        return Switch, ()


class Hooks:
    """Hooks on the modules of one model."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._switches: list[Switch] = []

    def add(self, handles: Iterable[RemovableHandle]) -> None:
        """Put a switch in place of each function, whoever registered it."""
        for handle in handles:
            functions = handle.hooks_dict_ref()
            if functions is None:  # the module is gone
                continue
            switch = functions[handle.id] = Switch(functions[handle.id])
            self._switches.append(switch)
            self._handles.append(handle)

    def close(self) -> None:
        for switch in self._switches:
            switch.turn_off()
        for handle in self._handles:
            handle.remove()
