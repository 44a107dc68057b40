"""Which modules an engine shards on their own: their parameters are gathered and freed together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from lightning_soo.naming import nearest

_LISTS = (nn.ModuleList, nn.Sequential)
_NO_FORWARD = (nn.ModuleList, nn.ModuleDict)  # fully_shard refuses them


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
