"""Names of a model's parameters, and which of them train, as the engines that wrap models leave them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_soo.placement.fragments import canonical_name


class ParameterNames:
    """First canonical name of every parameter of a model, by identity.

    FSDP1 without original parameters takes them out of their modules and leaves plain tensors, views of one flat
    parameter: what it knows of them stands in for what ``named_parameters()`` no longer says.
    """

    def __init__(self, model: nn.Module) -> None:
        self._flat: dict[nn.Module, dict[str, bool]] = {}
        for module in model.modules():
            flat: Any = getattr(getattr(module, "_handle", None), "flat_param", None)
            for name, owner in _flattened(flat):
                self._flat.setdefault(owner, {})[name] = flat.requires_grad
        self._names: dict[int, str] = {}
        for prefix, module in model.named_modules():
            for name in self._own(module):
                full = canonical_name(f"{prefix}.{name}" if prefix else name)
                self._names.setdefault(id(getattr(module, name)), full)

    def has(self, module: nn.Module, name: str) -> bool:
        """Whether ``name``, with dots for a child's, is a parameter: not None, and not computed from others."""
        owner, attribute = _owner(module, name)
        return id(getattr(owner, attribute, None)) in self._names

    def canonical(self, module: nn.Module, name: str) -> str:
        owner, attribute = _owner(module, name)
        return self._names[id(getattr(owner, attribute))]

    def trains(self, module: nn.Module, name: str) -> bool:
        """Whether its gradient is asked for; one flat parameter answers for all that are in it."""
        owner, attribute = _owner(module, name)
        parameter = owner._parameters.get(attribute)
        return parameter.requires_grad if parameter is not None else self._flat.get(owner, {}).get(attribute, False)

    def any_trains(self, module: nn.Module) -> bool:
        """Whether a parameter that is the module's own, not its children's, trains."""
        return any(self.trains(module, name) for name in self._own(module))

    def _own(self, module: nn.Module) -> list[str]:
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        # the flat parameter itself is one of the wrapper's and not of the model
        own = [name for name in own if name != "_flat_param"]
        return own + [name for name in self._flat.get(module, {}) if name not in own]


def _flattened(flat: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every parameter in a flat one, shared ones under each of their names."""
    for info in (*getattr(flat, "_param_infos", ()), *getattr(flat, "_shared_param_infos", ())):
        yield info.param_name, info.module


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, attribute = name.split(".")
    return module.get_submodule(".".join(path)), attribute


def find_tensor(module: nn.Module, name: str) -> Tensor:
    """A module's parameter, also where an engine has put a plain tensor in its place for the time of a pass."""
    owner, attribute = _owner(module, name)
    found: Tensor = getattr(owner, attribute)
    return found


def held_tensor(module: nn.Module, name: str) -> Tensor | None:
    """As :func:`find_tensor`, without asking the module for it: ZeRO-3 would gather a parameter that is asked for."""
    owner, attribute = _owner(module, name)
    found = owner._parameters.get(attribute)
    return found if found is not None else owner.__dict__.get(attribute)
