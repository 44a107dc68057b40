"""Rows of the study made from laws: what a run needs to the target is a formula of batch size, settings and seed.

And the report's modules, which import each other by their short names, for the tests that read such rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from recipe_modules import flat

with flat("study") as module:
    cells, findings, limits, names, page = map(module, ("cells", "findings", "limits", "names", "page"))
    records, scaling, sensitivity = map(module, ("records", "scaling", "sensitivity"))
    tables, verdicts = map(module, ("tables", "verdicts"))

ORDERS = {"sgd": 1, "adamw": 1, "kfac": 2, "shampoo": 2, "sonew": 2, "trcg": 2, "strcg": 2}
EXAMPLES, BASE_EPOCHS = 4096, 10
AXES = {
    "sgd": ("lr", "momentum"),
    "adamw": ("lr", "beta2"),
    "kfac": ("lr", "damping"),
    "shampoo": ("lr", "preconditioner_eps"),
    "sonew": ("lr", "eps"),
    "trcg": ("radius", "max_cg_iterations"),
    "strcg": ("radius", "hessian_fraction"),
}
SIZES = (64, 256, 1024, 4096)
VALUES = (0.1, 1.0, 10.0)

Law = Callable[[int], float | None]  # steps to the target of the best setting; None: never


def falling(samples: float, floor: float = 0.0) -> Law:
    """Ideal scaling down to a floor: the critical batch size is samples / floor."""
    return lambda size: max(samples / size, floor)


def never(size: int) -> None:
    return None


def row(
    task: str,
    method: str,
    size: int,
    values: tuple[float, float],
    seed: int,
    stage: str,
    steps: float | None,
    seconds_per_step: float = 0.01,
    final: float = 0.3,
    diverged: bool = False,
    smallest: int = SIZES[0],
) -> dict[str, Any]:
    """One line of runs.jsonl. The target counts as missed where `steps` is None or above the budget."""
    epochs = (math.log2(size / smallest) + 1) * BASE_EPOCHS
    budget = round(epochs * EXAMPLES / size)
    reached = None
    if steps is not None and steps <= budget and not diverged:
        reached = _clocks(steps, size, seconds_per_step)
    whole = _clocks(budget, size, seconds_per_step)
    end = {"train_loss": None if diverged else final, "validation_loss": 1.1 * final, "accuracy": 0.9}
    trust = {"rejected": budget // 4, "negative_curvature": budget // 2, "cg_iterations": 7 * budget}
    return {
        "id": f"{task}-{method}-{size}-{values}-{seed}",
        "preset": "small",
        "task": task,
        "method": method,
        "batch_size": size,
        "settings": dict(zip(AXES[method], values, strict=True)),
        "seed": seed,
        "stage": stage,
        "epochs": epochs,
        "steps": budget,
        "samples": budget * size,
        "seconds": whole["seconds"],
        "wall_seconds": 1.2 * whole["seconds"],
        "propagations": whole["propagations"],
        "target": 0.35,
        "reached": reached,
        "final": end,
        "best": end,
        "diverged": diverged,
        "counts": trust if "trcg" in method else {},
        "curve": [],
        "command": "python recipes/study/run.py --preset small",
        "version": "1.0",
        "commit": "abcdef0",
        "machine": "one of two cores",
        "data": "digits",
        "error": None,
    }


def _clocks(steps: float, size: int, seconds_per_step: float) -> dict[str, float]:
    return {
        "steps": steps,
        "samples": steps * size,
        "seconds": steps * seconds_per_step,
        "propagations": 2.0 * steps * size,
    }


def rows_of(
    task: str,
    method: str,
    law: Law,
    sizes: Iterable[int] = SIZES,
    seeds: Iterable[int] = (0, 1, 2),
    wobble: float = 0.02,
    penalty: float = 1.6,
    **others: Any,
) -> list[dict[str, Any]]:
    """The grid and the seeds of one method: the middle of the grid is best, each step away from it costs `penalty`.

    Args:
        wobble: seed 1 needs more than seed 0 by this share, seed 2 less.
    """
    found = []
    for size in sizes:
        best = law(size)
        for i, first in enumerate(VALUES):
            for j, second in enumerate(VALUES):
                times = penalty ** (abs(i - 1) + abs(j - 1))
                steps = None if best is None else best * times
                final = 0.3 * 1.2 ** (abs(i - 1) + abs(j - 1)) * (2.0 if best is None else 1.0)
                found.append(row(task, method, size, (first, second), 0, "grid", steps, final=final, **others))
        for seed in seeds:
            if seed:
                steps = None if best is None else best * (1 + wobble * (1 if seed % 2 else -1))
                final = 0.3 * (1 + 0.01 * seed)
                found.append(row(task, method, size, (1.0, 1.0), seed, "seeds", steps, final=final, **others))
    return found


def study_of(rows: Iterable[dict[str, Any]]) -> Any:
    return cells.Study.of(records.Record(**entry) for entry in rows)


def words(study: Any) -> str:
    """Every sentence of the findings, one a line."""
    sections = findings.findings(study, names.Names.of(study), scaling.scalings(study))
    return "\n".join(point for section in sections for point in section.points)
