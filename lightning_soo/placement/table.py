"""The plan as the table that rank 0 prints once, repeated layers folded into one row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from lightning_soo.placement.blocks import Block
from lightning_soo.placement.plan import Plan, PlannedParameter

_HEADER = ("parameter", "shape", "engine", "method", "blocks", "home", "refresher", "state", "note")


def plan_table(
    plan: Plan,
    *,
    engine: str,
    method: str,
    graft: str,
    has_diagonal_rows: Callable[[Block], bool] = lambda block: False,
) -> str:
    """Render the plan.

    Args:
        graft: what moves the parameters that are not preconditioned.
        has_diagonal_rows: whether a block's first dimension, which has no matrix, has a diagonal preconditioner.
    """
    groups: dict[tuple[object, ...], list[PlannedParameter]] = {}
    for parameter in plan.parameters:
        folded = re.sub(r"(?<![A-Za-z_])\d+(?![A-Za-z_])", "*", parameter.name)
        kinds = tuple((u.block.dims, u.block.orders) for u in parameter.units), bool(parameter.joined), parameter.note
        key = (folded, parameter.spec.shape, parameter.reason, kinds)
        groups.setdefault(key, []).append(parameter)
    rows = [_HEADER]
    for members in groups.values():
        first = members[0]
        held = sum(unit.root_bytes + unit.statistics_bytes + unit.moment_bytes for p in members for unit in p.units)
        owners = sorted({unit.refresher for p in members for unit in p.units})
        rows.append(
            (
                first.name if len(members) == 1 else f"{_folded_name(members)} ({len(members)})",
                "x".join(map(str, first.spec.shape)) or "scalar",
                engine,
                method if first.is_preconditioned else graft if first.spec.requires_grad else "-",
                _blocks_text(first, has_diagonal_rows),
                _homes_text(plan, members),
                _numbers(owners),
                format_bytes(held) if held else "-",
                first.reason or _note(members),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, *_summary(plan)])


def _summary(plan: Plan) -> list[str]:
    if not plan.units:
        return [
            f"{plan.preconditioned_share:.1%} of trainable elements preconditioned; neighbours travel at cuts alone"
        ]
    roots = sum(unit.root_bytes for unit in plan.units)
    held = plan.state_bytes
    lines = [
        f"{len(plan.units)} blocks; {plan.preconditioned_share:.1%} of trainable elements preconditioned; at most "
        f"{format_bytes(max(held))} of preconditioner state on a rank"
        + (f" ({plan.state_balance:.2f}x the mean)" if plan.ranks > 1 else "")
    ]
    if plan.ranks > 1:
        gathered = sum(unit.root_bytes + unit.statistics_bytes + unit.moment_bytes for unit in plan.units)
        lines.append(
            f"a checkpoint in one file gathers {format_bytes(gathered)} of it on rank 0; one in a folder nothing"
        )
        lines.append(
            f"refreshes divided over {plan.ranks} ranks, largest load {plan.balance:.2f}x the mean (at least "
            f"{plan.least_balance:.2f}x, as blocks are not divided); "
            f"{format_bytes(roots)} of roots gathered per interval"
        )
        travelling = sum(unit.place.travels for unit in plan.units)
        if travelling:
            lines.append(
                f"{travelling} blocks are cut by sharding: per step a rank sends or gets at most "
                f"{format_bytes(plan.exchange_bytes)} of gradients, and as much of directions, through at most "
                f"{format_bytes(plan.buffer_bytes)} of buffers"
            )
        else:
            lines.append("no gradient traffic")
    return lines


def _homes_text(plan: Plan, members: Sequence[PlannedParameter]) -> str:
    places = {unit.homes for member in members for unit in member.units}
    homes = sorted({home for found in places for home in found})
    if not homes:
        return "-"
    everywhere = all(len(unit.homes) == plan.ranks for member in members for unit in member.units)
    return "all" if everywhere and plan.ranks > 1 else _numbers(homes)


def _note(members: Sequence[PlannedParameter]) -> str:
    texts = ["with its weight" if members[0].joined else "", members[0].note, _travel_text(members)]
    return "; ".join(text for text in texts if text)


def _travel_text(members: Sequence[PlannedParameter]) -> str:
    count = sum(unit.place.travels for member in members for unit in member.units)
    return f"{count} cut" if count else ""


def _numbers(values: Sequence[int]) -> str:
    if len(values) > 8:
        return f"{values[0]},{values[1]},..,{values[-1]}"
    return ",".join(map(str, values)) or "-"


def _blocks_text(parameter: PlannedParameter, has_diagonal_rows: Callable[[Block], bool]) -> str:
    if parameter.chain is not None:
        return f"chains of {parameter.chain}"
    if not parameter.units:
        return "-"
    first = parameter.units[0].block
    shapes = sorted({unit.block.shape for unit in parameter.units}, reverse=True)
    sides = "" if len(first.dims) == len(shapes[0]) else f" dims {first.dims}"
    if has_diagonal_rows(first):
        sides += ", diagonal rows"
    largest = max(parameter.units, key=lambda unit: unit.block.shape).block
    factors = f", factors of {max(largest.orders)}" if largest.has_several else ""
    return f"{len(parameter.units)} of {'x'.join(map(str, shapes[0]))}{sides}{factors}"


def _folded_name(members: Sequence[PlannedParameter]) -> str:
    """``layers.{0..5}.weight``: the range of every number that differs."""
    pieces = [re.split(r"(?<![A-Za-z_])(\d+)(?![A-Za-z_])", member.name) for member in members]
    name = ""
    for column in zip(*pieces, strict=True):
        values = sorted(set(column), key=lambda text: (len(text), text))
        name += values[0] if len(values) == 1 else f"{{{values[0]}..{values[-1]}}}"
    return name


def format_bytes(count: float) -> str:
    """``1.5 MiB``; binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or math.isclose(count, round(count)) else f"{count:.1f} {unit}"
