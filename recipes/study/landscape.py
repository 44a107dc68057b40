"""The loss on a plane through a solution, in two random directions normalised by filter (Li et al. 2018).

A direction has the norm of the solution in every filter, a row of a weight matrix; biases do not move. All solutions of
a task see the same two directions, before they are normalised.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plan import Plan, Run
from records import Record, tuned

REACH = 1.0  # of the plane, in norms of the filters


def wanted(plan: Plan, rows: Iterable[Record]) -> list[Run]:
    """The tuned runs of every method at the smallest and the largest batch size of each task."""
    found, rows = [], list(rows)
    for cell in plan.cells():
        sizes = plan.preset.task(cell[0]).batch_sizes
        grid = {run.id: run for run in plan.grid(cell)}
        point = tuned(row for row in rows if row.id in grid)
        if cell[2] in (sizes[0], sizes[-1]) and point is not None:
            found.append(grid[point.id])
    return found


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, planes: list[dict[str, Any]]) -> None:
    """One plane a line, in one move: a study that is killed leaves the file whole."""
    temporary = path.with_suffix(".tmp")
    lines = ",\n".join(json.dumps(plane, allow_nan=False) for plane in planes)
    temporary.write_text(f"[{lines}]\n")
    os.replace(temporary, path)


def plane(run: Run, solution: Path, data_dir: Path | None) -> dict[str, Any]:
    """The plane through the run's solution; it is trained again where its file is not there.

    Raises:
        RuntimeError: training it again failed.
    """
    import torch
    from presets import PRESETS
    from trial import evaluate, perform, problem_of

    if not solution.exists():
        row = perform(run, data_dir, solution, {})
        if not solution.exists():
            raise RuntimeError(f"{run.describe()}: no solution to look around ({row.error or 'diverged'})")
    preset, problem = PRESETS[run.preset], problem_of(run.preset, run.task, data_dir)
    model = problem.model()
    model.load_state_dict(torch.load(solution, weights_only=True))
    here = [parameter.detach().clone() for parameter in model.parameters()]
    directions = [_direction(here, seed) for seed in (1, 2)]
    points = preset.landscape_points
    offsets = [float(f"{REACH * (2 * index / (points - 1) - 1):.4g}") for index in range(points)]
    subset = tuple(part[: preset.landscape_examples] for part in problem.training)
    losses = []
    for alpha in offsets:
        losses.append([])
        for beta in offsets:
            with torch.no_grad():
                for parameter, middle, first, second in zip(model.parameters(), here, *directions, strict=True):
                    parameter.copy_(middle + alpha * first + beta * second)
            loss, _ = evaluate(model, problem, subset, False)
            losses[-1].append(float(f"{loss:.5g}") if math.isfinite(loss) else None)
    names = ("id", "task", "method", "batch_size", "seed")
    return {**{name: getattr(run, name) for name in names}, "alphas": offsets, "betas": offsets, "loss": losses}


def _direction(weights: list[Any], seed: int) -> list[Any]:
    """Random, with the norm of each filter; zero for vectors."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = []
    for weight in weights:
        random = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            found.append(torch.zeros_like(weight))
            continue
        filters, norms = random.flatten(1), weight.flatten(1).norm(dim=1, keepdim=True)
        found.append((filters / filters.norm(dim=1, keepdim=True) * norms).view_as(weight))
    return found
