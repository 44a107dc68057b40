"""What a plan will cost: a few steps of every method on every task are timed first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from plan import Plan, Run
from pool import Pool
from trial import time_evaluation, time_steps

Cell = tuple[str, str, int]


def costs(plan: Plan, cells: Iterable[Cell], pool: Pool, data_dir: Path | None) -> tuple[dict[Cell, float], list[str]]:
    """Processor seconds of one run of each cell, evaluations included; and what could not be timed, with its error.

    Steps are those of the point in the middle of the grid, as training begins. Batch sizes that are too slow to be
    timed lie on the line through the two before.
    """
    cells = list(cells)
    items: list[tuple[str, str | None]] = []
    for task, method in dict.fromkeys(cell[:2] for cell in cells):
        items += [(task, None)] * ((task, None) not in items) + [(task, method)]
    waiting = iter(items)

    def call(item: tuple[str, str | None]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        task, method = item
        runs = [_middle(plan, task, method or plan.methods[0], size) for size in plan.preset.task(task).batch_sizes]
        return (time_steps, (runs, data_dir)) if method else (time_evaluation, (runs[0], data_dir))

    timed: dict[tuple[str, str | None], Any] = {}
    failed: list[str] = []
    for item, result, error in pool.work(lambda: next(waiting, None), call):
        timed[item] = result
        failed += [f"{item[0]} {item[1] or 'evaluation'}: {error}"] * (error is not None)
    found = {}
    for task, method, batch_size in cells:
        steps = plan.preset.task(task).steps(batch_size)
        evaluations = min(plan.preset.evaluations, steps) + 1
        points = timed[task, method]
        spent = evaluations * (timed[task, None] or 0.0) + steps * _at(batch_size, points) if points else 0.0
        found[task, method, batch_size] = spent
    return found, failed


def _middle(plan: Plan, task: str, method: str, batch_size: int) -> Run:
    grid = plan.grid((task, method, batch_size))
    return grid[len(grid) // 2]


def _at(batch_size: int, points: dict[int, float]) -> float:
    """As timed, or on the line through the last two points; a line that falls is not believed."""
    if batch_size in points:
        return points[batch_size]
    *_, large = sorted(points)
    small = max((size for size in points if size < large), default=0)
    slope = (points[large] - points.get(small, 0.0)) / (large - small)
    return points[large] + max(0.0, slope) * (batch_size - large)


def table(plan: Plan, found: dict[Cell, float]) -> list[str]:
    """Core-hours of tasks and methods, as lines; grids and seeds."""
    runs = plan.preset.points + len(plan.preset.seeds) - 1
    width = max(len(method) for method in plan.methods) + 2
    lines = [" " * width + "".join(f"{task:>13}" for task in plan.tasks)]
    for method in plan.methods:
        sums = (sum(s for (t, m, _), s in found.items() if (t, m) == (task, method)) for task in plan.tasks)
        lines.append(method.ljust(width) + "".join(f"{value * runs / 3600:13.3g}" for value in sums))
    return lines
