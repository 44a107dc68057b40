"""Which saved preconditioner blocks belong to the plan of this run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.manifest import FORMAT
from lightning_soo.checkpoint.report import LoadReport
from lightning_soo.placement.plan import Plan, PlannedParameter
from lightning_soo.preconditioners.kronecker import KroneckerBlock


def fitting_blocks(
    saved: Mapping[str, Any],
    plan: Plan,
    kind: type[KroneckerBlock],
    method: str,
    same: Collection[str],
    report: LoadReport,
    shapes: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
) -> dict[str, Any]:
    """``saved`` without what does not fit; a parameter's blocks fit together or not at all.

    Args:
        same: names of parameters that are the same there and here.
        shapes: of arrays that are not read yet, by their names.

    Raises:
        CheckpointError: the blocks of another method or of a newer format, or not all of them.
    """
    try:
        _check(saved, method)
        blocks, flights = saved["blocks"], saved["in_flight"]
        kept: set[str] = set()
        for parameter in plan.parameters:
            if parameter.name in same and parameter.units:
                reason = _difference(parameter, blocks, kind, shapes or {}) if blocks or saved["steps"] else ""
                if reason:
                    report.anew[f"preconditioner of {parameter.name}"] = reason
                else:
                    kept |= {unit.key for unit in parameter.units}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the saved preconditioners are damaged ({type(error).__name__}: {error})") from None
    known = {unit.key for unit in plan.units}
    for key in blocks:
        name = key.split("/")[0]
        if key not in known and name in same and f"preconditioner of {name}" not in report.anew:
            report.ignored[f"preconditioner of {name}"] = "this run does not precondition it, or in other blocks"
    return {
        **saved,
        "blocks": {key: entry for key, entry in blocks.items() if key in kept},
        "in_flight": [row for row in flights if row["key"] in kept],
    }


def _check(saved: Mapping[str, Any], method: str) -> None:
    if saved["format"] > FORMAT:
        raise CheckpointError(f"state of format {saved['format']}; this version reads up to {FORMAT}: update it")
    if saved["method"] != method:
        raise CheckpointError(f"state of {saved['method']!r}, but this optimizer is {method!r}")
    if not saved["complete"]:
        raise CheckpointError(
            "state saved on several ranks without consolidate(): the statistics of other ranks' blocks are "
            "missing. Call optimizer.consolidate() on every rank before state_dict()"
        )


def _difference(
    parameter: PlannedParameter,
    blocks: Mapping[str, Any],
    kind: type[KroneckerBlock],
    shapes: Mapping[str, tuple[tuple[int, ...], Any]],
) -> str:
    """Why the saved blocks are not those of a parameter; empty where they are."""
    for unit in parameter.units:
        entry = blocks.get(unit.key)
        if entry is None:
            return (
                f"no saved block {unit.key!r}: was max_preconditioner_dim, merge_dims, precondition_1d, "
                "one_sided_above, an override or requires_grad changed?"
            )
        saved = entry.get("statistics", {}).get("matrices"), entry.get("roots")
        layouts = kind.statistics_layouts(unit.block), kind.root_layouts(unit.block)
        for name, arrays, expected in zip(("statistics", "roots"), saved, layouts, strict=True):
            if arrays is None:
                continue
            found, here = [_shape(array, shapes) for array in arrays], [layout.shape for layout in expected]
            if found != here:
                return (
                    f"block {unit.key}: saved {name} have shapes {found}, here they are {here}: was max_factor_dim, "
                    "one_sided_above or an override changed?"
                )
    return ""


def _shape(array: Any, shapes: Mapping[str, tuple[tuple[int, ...], Any]]) -> tuple[int, ...]:
    return tuple(shapes[array["array"]][0] if isinstance(array, Mapping) else array.shape)
