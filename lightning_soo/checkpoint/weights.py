"""What a checkpoint has of a model beside the parameters that its optimizers hold: frozen ones, and buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.checkpoint.manifest import Array
from lightning_soo.checkpoint.pieces import Piece, Wanted, whole
from lightning_soo.checkpoint.report import LoadReport
from lightning_soo.placement.adapters import read_layout
from lightning_soo.placement.fragments import Fragment, canonical_name
from lightning_soo.transport import Transport

MODEL, BUFFER = "model/", "buffer/"


def give_weights(
    model: nn.Module, known: Collection[str], transport: Transport, *, frozen: bool = True
) -> tuple[list[Piece], dict[str, list[int]]]:
    """Pieces of what no optimizer gives, and the shapes of all of it. Collective.

    Args:
        known: names of the optimizers' parameters.
        frozen: whether those that are not trained are given too.
    """
    pieces, shapes = [], {}
    for name, parameter in _partitioned(model, known, frozen).items():
        with _gathered(parameter):
            shapes[name] = tuple(parameter.shape)
            if transport.rank == 0:
                pieces.append(whole(f"{MODEL}{name}", parameter.detach().clone()))
    fragments = _fragments(model, known, frozen)
    if fragments:  # as many on every rank
        rows = transport.all_gather_integers([edge for one in fragments for edge in (one.start, one.stop)])
        for index, fragment in enumerate(fragments):
            shapes[fragment.name] = fragment.shape
            held = [(row[2 * index], row[2 * index + 1]) for row in rows]
            if held.index(held[transport.rank]) == transport.rank:  # the first that holds them
                pieces.append(_piece(fragment))
    if transport.rank == 0:
        pieces += [whole(f"{BUFFER}{name}", buffer) for name, buffer in persistent_buffers(model).items()]
    return pieces, {name: list(shape) for name, shape in shapes.items()}


def want_weights(
    model: nn.Module,
    known: Collection[str],
    arrays: Mapping[str, Array],
    report: LoadReport,
    *,
    frozen: bool = True,
) -> Wanted:
    """Where the rest of the weights goes. Local.

    Args:
        frozen: whether the checkpoint has those that are not trained; otherwise they stay as they are.
    """
    pieces, gathered = [], []
    for name, parameter in _partitioned(model, known, frozen).items():
        if _fits(name, tuple(parameter.ds_shape), arrays.get(f"{MODEL}{name}"), report):  # type: ignore[attr-defined]
            value = torch.empty(parameter.ds_shape, dtype=parameter.dtype)  # type: ignore[attr-defined]
            gathered.append((parameter, value))
            pieces.append(whole(f"{MODEL}{name}", value))
    for fragment in _fragments(model, known, frozen):
        if _fits(fragment.name, fragment.shape, arrays.get(f"{MODEL}{fragment.name}"), report):
            pieces.append(_piece(fragment))
    for name, buffer in persistent_buffers(model).items():
        if _fits(name, tuple(buffer.shape), arrays.get(f"{BUFFER}{name}"), report):
            pieces.append(whole(f"{BUFFER}{name}", buffer))
    here = {piece.key.split("/", 1)[1] for piece in pieces} | set(known) | set(report.anew)
    for name in (key.split("/", 1)[1] for key in arrays if key.startswith((MODEL, BUFFER))):
        if name not in here:
            report.ignored[name] = "nothing of this name here"

    def install() -> None:
        for parameter, value in gathered:
            with _gathered(parameter, changed=True):
                parameter.data.copy_(value)

    return Wanted(pieces, install)


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


def _others(model: nn.Module, known: Collection[str], frozen: bool) -> dict[str, nn.Parameter]:
    found = ((canonical_name(name), parameter) for name, parameter in model.named_parameters())
    return {name: one for name, one in found if name not in known and (frozen or one.requires_grad)}


def _partitioned(model: nn.Module, known: Collection[str], frozen: bool) -> dict[str, nn.Parameter]:
    """Those that DeepSpeed's stage 3 holds in parts, which are gathered one by one."""
    return {name: one for name, one in _others(model, known, frozen).items() if hasattr(one, "ds_id")}


@contextmanager
def _gathered(parameter: nn.Parameter, *, changed: bool = False) -> Iterator[None]:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0 if changed else None):
        yield


def _fragments(model: nn.Module, known: Collection[str], frozen: bool) -> list[Fragment]:
    """What this rank holds of the others."""
    others = {name: one for name, one in _others(model, known, frozen).items() if not hasattr(one, "ds_id")}
    if not others:
        return []
    if hasattr(model, "zero_optimization"):  # DeepSpeed's engine: what is not in parts is whole
        return [
            Fragment(name=name, shape=tuple(one.shape), start=0, stop=one.numel(), tensor=one)
            for name, one in others.items()
        ]
    groups: list[dict[str, Any]] = [{"params": list(others.values()), "param_names": list(others)}]
    return [one for one in read_layout(groups, model).fragments if one.name not in known]


def _piece(fragment: Fragment) -> Piece:
    local = fragment.local(fragment.tensor.detach())
    return Piece(key=f"{MODEL}{fragment.name}", shape=fragment.shape, start=fragment.start, tensor=local)
