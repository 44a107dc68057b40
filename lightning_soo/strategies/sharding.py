"""Which modules FSDP2 shards on their own, without the user writing ``configure_model``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_soo.naming import nearest
from lightning_soo.transport import Transport

_LISTS = (nn.ModuleList, nn.Sequential)
_NO_FORWARD = (nn.ModuleList, nn.ModuleDict)  # fully_shard refuses them


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    classes: Sequence[type[nn.Module] | str] | None = None,
    minimum_parameters: int | None = None,
    **options: Any,
) -> list[str]:
    """``fully_shard`` the modules that :func:`modules_to_shard` chooses, then the root. Collective.

    Args:
        model: sharded in place; one that is sharded already is left as it is.
        mesh: one dimension, or (replicate, shard).
        options: of ``fully_shard``.

    Returns:
        Names of the modules sharded below the root, inner ones first.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return []
    names = modules_to_shard(model, classes, minimum_parameters)
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return names


def modules_to_shard(
    model: nn.Module,
    classes: Sequence[type[nn.Module] | str] | None = None,
    minimum_parameters: int | None = None,
) -> list[str]:
    """Names of the modules whose parameters are gathered and freed together, inner modules first.

    Modules of the given classes; and every module that holds ``minimum_parameters`` not held by such a module inside
    it. With neither, the members of every list of repeated layers. A module that shares a parameter with one outside
    (a tied embedding) stays with the root.

    Raises:
        ValueError: a class that the model does not have.
    """
    if classes is None and minimum_parameters is None:
        chosen = set(_repeated_layers(model))
    else:
        chosen = _of_classes(model, classes or ())
        if minimum_parameters is not None:
            chosen |= _of_size(model, minimum_parameters, chosen)
    chosen = _without_shared(model, chosen)
    return [name for name in _inner_first(model) if name in chosen]


def start_alike(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0, as DDP does: a shard of other weights would go unnoticed."""
    transport = Transport()
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            if not tensor.is_meta:
                transport.share(tensor, "rank 0's weights")


def _inner_first(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name][::-1]


def _repeated_layers(model: nn.Module, prefix: str = "") -> Iterable[str]:
    """Outermost members of lists in which two members or more have the same class and parameters of the same shapes."""
    children = [(f"{prefix}{name}", child) for name, child in model.named_children()]
    kinds = [(type(child), tuple(parameter.shape for parameter in child.parameters())) for _, child in children]
    for (name, child), kind in zip(children, kinds, strict=True):
        repeated = isinstance(model, _LISTS) and kind[1] and kinds.count(kind) > 1
        if repeated and not isinstance(child, _NO_FORWARD):
            yield name
        else:
            yield from _repeated_layers(child, f"{name}.")


def _of_classes(model: nn.Module, classes: Sequence[type[nn.Module] | str]) -> set[str]:
    present = {base.__name__ for module in model.modules() for base in type(module).__mro__[:-1]}
    chosen: set[str] = set()
    for wanted in classes:
        found = {
            name
            for name, module in model.named_modules()
            if name
            and not isinstance(module, _NO_FORWARD)
            and (
                wanted in [base.__name__ for base in type(module).__mro__]
                if isinstance(wanted, str)
                else isinstance(module, wanted)
            )
        }
        if not found:
            word = wanted if isinstance(wanted, str) else wanted.__name__
            hint = nearest(word, sorted(present - {word}))
            raise ValueError(f"no module of class {word!r} in {type(model).__name__} can be sharded{hint}")
        chosen |= found
    return chosen


def _of_size(model: nn.Module, minimum: int, chosen: set[str]) -> set[str]:
    held: set[int] = set()  # parameters inside a module that is chosen
    found: set[str] = set()
    for name in _inner_first(model):
        module = model.get_submodule(name)
        own = {id(parameter): parameter.numel() for parameter in module.parameters() if id(parameter) not in held}
        if name in chosen or (sum(own.values()) >= minimum and not isinstance(module, _NO_FORWARD)):
            found.add(name)
            held |= own.keys()
    return found


def _without_shared(model: nn.Module, chosen: set[str]) -> set[str]:
    while True:
        owners: dict[int, set[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parts = name.split(".")[:-1]
            prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            owner = next((prefix for prefix in prefixes if prefix in chosen), "")
            owners.setdefault(id(parameter), set()).add(owner)
        shared = {owner for found in owners.values() if len(found) > 1 for owner in found} - {""}
        if not shared:
            return chosen
        chosen = chosen - shared
