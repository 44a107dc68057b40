"""An optimizer's part of a checkpoint folder: parameters, moments and preconditioners by name and range."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.manifest import Array
from lightning_soo.checkpoint.pieces import Piece, Wanted
from lightning_soo.checkpoint.report import LoadReport, compare_parameters
from lightning_soo.checkpoint.trees import put_together, take_apart
from lightning_soo.checkpoint.weights import MODEL
from lightning_soo.optim.gathered import GatheredOptimizer
from lightning_soo.optim.grafting import MOMENTS
from lightning_soo.optim.stateful import StatefulOptimizer
from lightning_soo.optim.torch_states import saved_group, settings_of
from lightning_soo.placement.fragments import Fragment, to_local
from lightning_soo.transport import entries_of

logger = logging.getLogger(__name__)
Portable = StatefulOptimizer | GatheredOptimizer


def give(optimizer: Portable, number: int) -> tuple[dict[str, Any], list[Piece]]:
    """What this rank gives: plain data, and pieces that no other rank gives. Local; the optimizer is attached.

    Args:
        number: of the optimizer, for the names of its arrays.
    """
    layout, table = optimizer._layout, optimizer._fragment_table
    assert layout is not None and table is not None
    rank, pieces = optimizer._transport.rank, []
    steps: dict[str, Any] = {}
    for index, fragment in enumerate(layout.fragments):
        state = optimizer.state.get(fragment.tensor, {})
        counters = {name: _number(value) for name, value in state.items() if _is_number(value)}
        steps[fragment.name] = {**counters, **optimizer._counters(fragment.name)}
        numel = math.prod(fragment.shape)
        alone = index % table.ranks == rank if table.shards == 1 else table.counts(rank, index, numel)
        if not alone:
            continue
        for key, tensor in _arrays(fragment, state, number).items():
            local = fragment.local(tensor.detach())
            pieces.append(Piece(key=key, shape=fragment.shape, start=fragment.start, tensor=local))
    content: dict[str, Any] = {
        "class": type(optimizer).__name__,
        "engine": layout.engine,
        "configuration": entries_of(optimizer.options),
        "parameters": {
            spec.name: {"group": group, "trainable": spec.requires_grad}
            for spec, group in zip(layout.specs, layout.groups, strict=True)
        },
        "groups": [_plain_group(group) for group in optimizer._groups()],
        "state": steps,
    }
    if isinstance(optimizer, StatefulOptimizer):
        assert optimizer._plan is not None
        content["plan"] = optimizer._plan.blocks_digest()
        content["blocks"], arrays = take_apart(optimizer.blocks_share(), f"optimizer.{number}/blocks")
        pieces += arrays
    return content, pieces


def want(
    optimizer: Portable,
    content: Mapping[str, Any],
    arrays: Mapping[str, Array],
    number: int,
    report: LoadReport,
    *,
    strict: bool = True,
) -> Wanted:
    """What this rank needs of a checkpoint, and how it is installed. Local; changes nothing.

    Raises:
        CheckpointError: the state of another method; with ``strict`` also anything that does not fit, as ``report``
            has it.
    """
    layout = optimizer._layout
    assert layout is not None
    name = type(optimizer).__name__
    if content.get("class", name) != name:  # a file in which it is not said has it with the blocks
        raise CheckpointError(f"the checkpoint is of a {content['class']}, this optimizer is a {name}")
    here = {spec.name: tuple(spec.shape) for spec in layout.specs}
    weights = {key.removeprefix(MODEL): array.shape for key, array in arrays.items() if key.startswith(MODEL)}
    same = compare_parameters(weights, here, report)
    for spec in layout.specs:
        if spec.requires_grad and not content["parameters"].get(spec.name, {}).get("trainable") and spec.name in same:
            report.anew[f"moments of {spec.name}"] = "it was frozen, or in no optimizer"
    if len(content["groups"]) != len(optimizer._groups()):
        report.ignored["parameter groups"] = f"{len(content['groups'])} there, {len(optimizer._groups())} here"
    blocks, block_pieces = None, list[Piece]()
    adopts = isinstance(optimizer, StatefulOptimizer) and content.get("blocks") is None
    if adopts and not getattr(optimizer, "adopts", False):
        raise CheckpointError(
            f"the checkpoint is of another optimizer than this {name}: adopt=True (of the SecondOrder callback or the "
            "strategy), or adopt: true in a configuration, takes the moments of AdamW or SGD and begins preconditioners"
        )
    if isinstance(optimizer, StatefulOptimizer) and not adopts:
        shapes = {key: (array.shape, array.torch_dtype) for key, array in arrays.items()}
        blocks, block_pieces = put_together(optimizer.blocks_fitting(content["blocks"], same, report, shapes), shapes)
    report.taken += [name for name in here if name in same]
    if strict:
        report.refuse()

    # of moments that do not exist here yet the tensors are made now, but only installed with the rest
    made: list[tuple[Tensor, str, Tensor]] = []
    pieces = []
    for fragment in layout.fragments:
        if fragment.name not in same or fragment.start == fragment.stop:
            continue
        targets: dict[str, Tensor] = {f"{MODEL}{fragment.name}": fragment.tensor.detach()}
        prefix = f"optimizer.{number}/moment/{fragment.name}/"
        for key in (key for key in arrays if key.startswith(prefix)):
            field = key.removeprefix(prefix)
            if adopts and field not in MOMENTS:
                continue
            known = optimizer.state[fragment.tensor].get(field) if fragment.tensor in optimizer.state else None
            if known is None:
                known = next((one for tensor, other, one in made if tensor is fragment.tensor and other == field), None)
            if known is None:
                known = torch.zeros_like(fragment.tensor, dtype=arrays[key].torch_dtype)
                made.append((fragment.tensor, field, known))
            targets[key] = known
        for key, tensor in targets.items():
            local = fragment.local(tensor)
            pieces.append(Piece(key=key, shape=fragment.shape, start=fragment.start, tensor=local))

    def install() -> None:
        for tensor, field, moment in made:
            optimizer.state[tensor][field] = moment
        for fragment in layout.fragments:
            if fragment.name in same:
                _take_counters(optimizer, fragment, content["state"].get(fragment.name, {}))
        group_of = {name: row["group"] for name, row in content["parameters"].items()}
        for index, group in enumerate(optimizer._groups()):
            members = [spec.name for spec, own in zip(layout.specs, layout.groups, strict=True) if own == index]
            saved = content["groups"][saved_group(index, members, group_of, len(content["groups"]))]
            _take_group(group, settings_of(group, saved) if adopts else saved)
        if adopts:
            assert isinstance(optimizer, StatefulOptimizer)
            optimizer.restart_blocks()
            logger.info("%s: moments go on, preconditioners start anew", name)
        else:
            optimizer._has_taken(blocks)

    return Wanted([*pieces, *block_pieces], install)


def _arrays(fragment: Fragment, state: Mapping[str, Any], number: int) -> dict[str, Tensor]:
    """The parameter and its moments, by the names of their arrays."""
    found = {f"{MODEL}{fragment.name}": fragment.tensor}
    size = to_local(fragment.tensor).numel()
    for field, value in state.items():
        if isinstance(value, Tensor) and not _is_number(value) and to_local(value).numel() == size:
            found[f"optimizer.{number}/moment/{fragment.name}/{field}"] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.ndim == 0)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _take_counters(optimizer: Portable, fragment: Fragment, saved: Mapping[str, Any]) -> None:
    if not saved:
        return
    state = optimizer.state[fragment.tensor]
    for name, value in saved.items():
        if optimizer._take_counter(fragment.name, name, value):
            continue
        known = state.get(name)
        if isinstance(known, Tensor):
            known.fill_(value)
        else:
            state[name] = torch.tensor(float(value)) if name == "step" else value


def _plain_group(group: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {name: _number(value) if _is_number(value) else value for name, value in kept.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, str) or _is_number(value)


def _take_group(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    for name, value in saved.items():
        known = group.get(name)
        if isinstance(known, Tensor):
            known.fill_(value)
        else:
            group[name] = tuple(value) if isinstance(value, list) else value
