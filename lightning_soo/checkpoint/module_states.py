"""What modules keep beside parameters and buffers: their ``get_extra_state``, such as scales of fp8."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_soo.checkpoint.manifest import Array
from lightning_soo.checkpoint.pieces import Piece, Wanted
from lightning_soo.checkpoint.report import LoadReport
from lightning_soo.checkpoint.trees import put_together, take_apart
from lightning_soo.placement.fragments import module_name

logger = logging.getLogger(__name__)
_KEY = "state"


def give_states(model: nn.Module) -> tuple[dict[str, Any], list[Piece]]:
    """Plain data by module, and its tensors as pieces. Of one rank: they are the same on all.

    What is neither plain nor a tensor stays out, and is named in a warning.
    """
    states: dict[str, Any] = {}
    pieces: list[Piece] = []
    for name, module in _with_state(model).items():
        try:
            states[name], own = take_apart(module.get_extra_state(), f"{_KEY}/{name}")
        except TypeError as error:
            logger.warning("the extra state of module %r is not in the checkpoint: %s", name, error)
            continue
        pieces += own
    return states, pieces


def want_states(model: nn.Module, states: Mapping[str, Any], arrays: Mapping[str, Array], report: LoadReport) -> Wanted:
    """What :func:`give_states` gave, for the modules of the same names."""
    here = _with_state(model)
    for name in here.keys() - states.keys():
        report.anew[f"extra state of {name}"] = "the checkpoint does not have it"
    for name in states.keys() - here.keys():
        report.ignored[f"extra state of {name}"] = "no module of this name has one here"
    shapes = {key: (array.shape, array.torch_dtype) for key, array in arrays.items() if key.startswith(f"{_KEY}/")}
    found, pieces = put_together({name: states[name] for name in states if name in here}, shapes)

    def install() -> None:
        for name, state in found.items():
            here[name].set_extra_state(state)

    return Wanted(pieces, install)


def _with_state(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with an extra state, by canonical names; of wrappers that pass on what they wrap, the innermost."""
    found = {}
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[module_name(path)] = module
    return found
