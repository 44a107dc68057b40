"""What is hung on a module: a function that a copy of the module does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._dynamo import eval_frame
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

    def __call__(self, *positional: Any, **named: Any) -> Any:
        if self._function is None:
            return None
        if torch.compiler.is_compiling() or _callback() is not None:
            return _outside(self._function, *positional, **named)
        return self._function(*positional, **named)  # nothing compiled is running: a tenth of the time

    def turn_off(self) -> None:
        """For good, also where compiled code kept it."""
        self._function = None

    def __reduce__(self) -> tuple[type[Switch], tuple[()]]:
        return Switch, ()


@_disable_dynamo  # torch.compiler.disable, but for an import of two seconds before there is a first call
def _outside(function: Callable[..., Any], *positional: Any, **named: Any) -> Any:
    # traced into where a module calls it, but no graph of its own where it is called between graphs
    torch._dynamo.eval_frame.skip_code(Switch.__call__.__code__)
    return function(*positional, **named)


# what torch.compile has set for the frames that run now; where torch does not tell, it may be anything
_callback: Callable[[], Any] = getattr(eval_frame, "get_eval_frame_callback", lambda: True)


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
