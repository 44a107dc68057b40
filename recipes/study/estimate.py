"""What a plan will cost: a few steps of every method on every task are timed first."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from plan import Plan, Run
from pool import Pool
from trial import time_steps

LARGEST = 1024  # batch that is timed, or B0 where that is larger

Cell = tuple[str, str, int]


def costs(plan: Plan, cells: Iterable[Cell], pool: Pool, data_dir: Path | None) -> tuple[dict[Cell, float], list[str]]:
    """Processor seconds of one run of each cell, evaluations included; and what could not be timed, with its error.

    A step takes a fixed time and a time per example: both come from two batch sizes, each the mean of two corners of
    the grid.
    """
    cells = list(cells)
    items: list[tuple[str, str, int, Run]] = []
    for task, method in dict.fromkeys(cell[:2] for cell in cells):
        sizes = plan.preset.task(task).batch_sizes
        for size in sorted({sizes[0], max((s for s in sizes if s <= LARGEST), default=sizes[0])}):
            grid = plan.grid((task, method, size))
            items += [(task, method, size, run) for run in (grid[0], grid[-1])]
    waiting = iter(items)
    timed: dict[tuple[str, str], dict[int, list[float]]] = {}
    evaluation: dict[str, float] = {}
    failed = dict[str, None]()
    for (task, method, size, _), result, error in pool.work(
        lambda: next(waiting, None), lambda item: (time_steps, (item[3], data_dir))
    ):
        if error is not None:
            failed[f"{task} {method}: {error}"] = None
            continue
        timed.setdefault((task, method), {}).setdefault(size, []).append(result[0])
        evaluation[task] = result[1]
    found = {}
    for task, method, batch_size in cells:
        points = {size: sum(s) / len(s) for size, s in timed.get((task, method), {}).items()}
        preset = plan.preset.task(task)
        step = _at(batch_size, points)
        evaluations = min(plan.preset.evaluations, preset.steps(batch_size)) + 1
        found[task, method, batch_size] = preset.steps(batch_size) * step + evaluations * evaluation.get(task, 0.0)
    return found, list(failed)


def _at(batch_size: int, points: dict[int, float]) -> float:
    """On the line through the points; a line that falls is not believed."""
    if not points:
        return 0.0
    (small, low), (large, high) = min(points.items()), max(points.items())
    slope = max(0.0, (high - low) / (large - small)) if large > small else 0.0
    return low + slope * (batch_size - small)


def table(plan: Plan, found: dict[Cell, float]) -> list[str]:
    """Core-hours of tasks and methods, as lines; grids and seeds."""
    runs = plan.preset.grid**2 + len(plan.preset.seeds) - 1
    width = max(len(method) for method in plan.methods) + 2
    lines = [" " * width + "".join(f"{task:>13}" for task in plan.tasks)]
    for method in plan.methods:
        sums = (sum(s for (t, m, _), s in found.items() if (t, m) == (task, method)) for task in plan.tasks)
        lines.append(method.ljust(width) + "".join(f"{value * runs / 3600:13.3f}" for value in sums))
    return lines
