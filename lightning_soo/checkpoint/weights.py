"""What a checkpoint has of a model beside the parameters that its optimizers hold: frozen ones, and buffers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_soo.checkpoint.manifest import Array
from lightning_soo.checkpoint.pieces import Piece, whole
from lightning_soo.checkpoint.report import LoadReport
from lightning_soo.placement.adapters import read_layout
from lightning_soo.placement.fragments import Fragment, canonical_name
from lightning_soo.transport import Transport

MODEL, BUFFER = "model/", "buffer/"


def give_weights(
    model: nn.Module, known: Collection[str], transport: Transport
) -> tuple[list[Piece], dict[str, list[int]]]:
    """Pieces of what no optimizer gives, and the shapes of all of it. Collective.

    Args:
        known: names of the optimizers' parameters.
    """
    fragments = _fragments(model, known)
    shapes = {fragment.name: fragment.shape for fragment in fragments}
    edges = [edge for fragment in fragments for edge in (fragment.start, fragment.stop)]
    pieces = []
    if fragments:  # the same on every rank
        rows = transport.all_gather_integers(edges)
        for index, fragment in enumerate(fragments):
            held = [(row[2 * index], row[2 * index + 1]) for row in rows]
            own = held[transport.rank]
            numel = math.prod(fragment.shape)
            if held.index(own) == transport.rank and (own != (0, numel) or (0, numel) not in held[: transport.rank]):
                pieces.append(_piece(fragment, fragment.tensor.detach()))
    if transport.rank == 0:
        pieces += [whole(f"{BUFFER}{name}", buffer) for name, buffer in persistent_buffers(model).items()]
    return pieces, {name: list(shape) for name, shape in shapes.items()}


def want_weights(
    model: nn.Module, known: Collection[str], arrays: Mapping[str, Array], report: LoadReport
) -> list[Piece]:
    """Where the rest of the weights goes. Local."""
    pieces = []
    for fragment in _fragments(model, known):
        array = arrays.get(f"{MODEL}{fragment.name}")
        if _fits(fragment.name, fragment.shape, array, report):
            pieces.append(_piece(fragment, fragment.tensor.detach()))
    buffers = persistent_buffers(model)
    for name, buffer in buffers.items():
        if _fits(name, tuple(buffer.shape), arrays.get(f"{BUFFER}{name}"), report):
            pieces.append(whole(f"{BUFFER}{name}", buffer))
    here = {piece.key for piece in pieces} | {f"{MODEL}{name}" for name in known}
    for key in arrays:
        if key.startswith((MODEL, BUFFER)) and key not in here and key.split("/", 1)[1] not in report.anew:
            report.ignored[key.split("/", 1)[1]] = "nothing of this name here"
    return pieces


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that ``state_dict`` has, by canonical names."""
    found = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[canonical_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def _fits(name: str, shape: tuple[int, ...], array: Array | None, report: LoadReport) -> bool:
    if array is None:
        report.anew[name] = "the checkpoint does not have it"
    elif array.shape != shape:
        report.anew[name] = f"its shape is {shape} here, {array.shape} in the checkpoint"
    else:
        return True
    return False


def _fragments(model: nn.Module, known: Collection[str]) -> list[Fragment]:
    """What this rank holds of parameters that no optimizer has."""
    parameters = [
        (name, parameter) for name, parameter in model.named_parameters() if canonical_name(name) not in known
    ]
    if not parameters:
        return []
    groups: list[dict[str, Any]] = [
        {"params": [parameter for _, parameter in parameters], "param_names": [name for name, _ in parameters]}
    ]
    return [one for one in read_layout(groups, model).fragments if one.name not in known]


def _piece(fragment: Fragment, tensor: Tensor) -> Piece:
    return Piece(
        key=f"{MODEL}{fragment.name}", shape=fragment.shape, start=fragment.start, tensor=fragment.local(tensor)
    )
