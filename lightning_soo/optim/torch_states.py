"""Torch's part of an optimizer's state: matched by name, and taken from torch's own optimizers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.report import LoadReport
from lightning_soo.optim.grafting import MOMENTS

if TYPE_CHECKING:
    from lightning_soo.optim.planned import PlannedOptimizer


# of a torch optimizer that are its user's choice, as where it is taken over alive
_SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "momentum", "dampening")


def parameter_names_of(optimizer: PlannedOptimizer) -> list[tuple[str, tuple[int, ...]]]:
    """Name and whole shape of every parameter, in order."""
    layout = optimizer._layout or optimizer._read_layout()
    return [(spec.name, tuple(spec.shape)) for spec in layout.specs]


def shapes_in(state_dict: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[int, ...] | None]:
    """Shapes of the parameters that a state is of, as their moments tell; None where there are none.

    Args:
        names: of the parameters, in the order of the state's groups.
    """
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    found: dict[str, tuple[int, ...] | None] = {}
    for name, number in zip(names, numbers, strict=False):
        moments = state_dict["state"].get(number, {})
        shapes = [tuple(moments[field].shape) for field in MOMENTS if isinstance(moments.get(field), Tensor)]
        found[name] = shapes[0] if shapes else None
    return found


def by_position(
    optimizer: PlannedOptimizer, state_dict: Mapping[str, Any], names: Sequence[str], taken: Collection[str]
) -> dict[str, Any]:
    """The state as of this optimizer's parameters: what was taken by name at their own places, nothing of others.

    Args:
        names: of the parameters in the state, in the order of its groups.
    """
    return _rearranged(optimizer, state_dict, names, taken, with_options=True)


def adopted(optimizer: PlannedOptimizer, state_dict: Mapping[str, Any], report: LoadReport) -> dict[str, Any]:
    """A torch optimizer's state as one of this optimizer's: its moments, learning rates and schedules.

    Raises:
        CheckpointError: no state of a torch optimizer, or of other parameters.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise CheckpointError(f"not the state of a torch optimizer: it has {sorted(map(str, state_dict))[:5]}")
    here = parameter_names_of(optimizer)
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    names: list[str] = [name for group in state_dict["param_groups"] for name in group.get("param_names", ())]
    if len(names) != len(numbers):
        names = [name for name, _ in here]
    if len(numbers) != len(here):
        raise CheckpointError(f"the state is of {len(numbers)} parameters, here are {len(here)}")
    shapes = shapes_in(state_dict, names)
    kept = {"step", *MOMENTS}
    for name, shape in here:
        there = shapes.get(name)
        if there is not None and there != shape:
            raise CheckpointError(f"{name!r}: its moments have shape {there}, the parameter has {shape}")
        report.taken.append(name)
        report.anew[f"preconditioner of {name}"] = "the state is a torch optimizer's"
    dropped = {field for moments in state_dict["state"].values() for field in moments} - kept
    for field in sorted(dropped):
        report.ignored[field] = f"{type(optimizer).__name__} does not have it"
    state = {
        number: {field: value for field, value in moments.items() if field in kept}
        for number, moments in state_dict["state"].items()
    }
    found = _rearranged(
        optimizer, {**state_dict, "state": state}, names, [name for name, _ in here], with_options=False
    )
    for own, given in zip(found["param_groups"], state_dict["param_groups"], strict=False):
        own |= settings_of(own, given)
    return found


def settings_of(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a user has chosen for a torch optimizer's group, of what the group here has too."""
    return {name: given[name] for name in _SETTINGS if name in given and (name in own or name == "initial_lr")}


def is_of_another(optimizer: PlannedOptimizer, state_dict: Mapping[str, Any]) -> bool:
    """Whether the groups of a state lack settings of this optimizer, as those of a torch optimizer do."""
    pairs = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    return any(set(own) - set(saved) - {"param_names", "initial_lr"} for own, saved in pairs)


def with_own_options(optimizer: PlannedOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A torch optimizer's state as an engine has divided it, with this optimizer's settings in its groups."""
    groups = []
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        options = {name: value for name, value in own.items() if name != "params"}
        groups.append({**options, **settings_of(own, saved), "params": saved["params"]})
    return {**state_dict, "param_groups": groups}


def _rearranged(
    optimizer: PlannedOptimizer,
    state_dict: Mapping[str, Any],
    names: Sequence[str],
    taken: Collection[str],
    *,
    with_options: bool,
) -> dict[str, Any]:
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    by_name = {name: state_dict["state"].get(number) for name, number in zip(names, numbers, strict=False)}
    groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    position = 0
    here = parameter_names_of(optimizer)
    own = iter(here)
    owners = [index for index, group in enumerate(state_dict["param_groups"]) for _ in group["params"]]
    group_of = dict(zip(names, owners, strict=False))
    for index, group in enumerate(optimizer.param_groups):
        members = [name for name, _ in here[position : position + len(group["params"])]]
        given = state_dict["param_groups"][saved_group(index, members, group_of, len(state_dict["param_groups"]))]
        places = list(range(position, position + len(group["params"])))
        options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        if with_options:
            options |= {name: value for name, value in given.items() if name not in ("params", "param_names")}
        groups.append({**options, "params": places})
        for place in places:
            name, shape = next(own)
            moments = by_name.get(name)
            if name in taken and moments is not None:
                state[place] = {
                    field: value.view(shape) if _is_flat(value, shape) else value for field, value in moments.items()
                }
        position += len(places)
    return {"state": state, "param_groups": groups}


def saved_group(index: int, members: Sequence[str], group_of: Mapping[str, int], count: int) -> int:
    """Which of ``count`` saved groups has the settings of group ``index`` here: that of its first parameter by name."""
    return next((group_of[name] for name in members if name in group_of), min(index, count - 1))


def _is_flat(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and len(shape) != 1 and value.numel() == math.prod(shape) > 1
