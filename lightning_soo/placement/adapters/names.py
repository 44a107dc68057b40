"""Names and module classes of parameters, by identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_soo.placement.fragments import canonical_name


def model_names(model: nn.Module | None) -> dict[int, str]:
    """``id(parameter)`` -> canonical name; a tied parameter keeps its first name."""
    if model is None:
        return {}
    return {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}


def module_classes(model: nn.Module | None) -> dict[int, tuple[str, ...]]:
    """``id(parameter)`` -> class names of every module that holds it.

    By identity, not by name: a tied embedding is found under whichever name it was registered first.
    """
    found: dict[int, tuple[str, ...]] = {}
    for module in model.modules() if model is not None else ():
        for parameter in module.parameters(recurse=False):
            found[id(parameter)] = found.get(id(parameter), ()) + class_names(module)
    return found


def class_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's class and its bases, most derived first."""
    return tuple(base.__name__ for base in type(module).__mro__[:-1] if base is not nn.Module)


def group_parameters(groups: Sequence[dict[str, Any]], model: nn.Module | None) -> list[tuple[Tensor, int, str]]:
    """Every parameter of the groups with its group's number and its name; ``group0.3`` where it never had one.

    Raises:
        ValueError: two parameters of one name: blocks, checkpoints and overrides go by names.
    """
    known = model_names(model)
    found = []
    owners: dict[str, tuple[Tensor, int]] = {}
    for number, group in enumerate(groups):
        given = group.get("param_names")
        for index, parameter in enumerate(group["params"]):
            name = known.get(id(parameter)) or (canonical_name(given[index]) if given else f"group{number}.{index}")
            other, elsewhere = owners.setdefault(name, (parameter, number))
            if other is not parameter:
                raise ValueError(
                    f"two parameters are named {name!r} (of parameter groups {elsewhere} and {number}, shapes "
                    f"{tuple(other.shape)} and {tuple(parameter.shape)}): give names of your own, as "
                    f"[(f'first.{{name}}', parameter) for name, parameter in model.named_parameters()]"
                )
            found.append((parameter, number, name))
    return found
