"""How much a method's result depends on its settings: the grid at each batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from statistics import quantiles

from cells import Cell, Study, to_target
from records import Record
from thresholds import SENSITIVITY_CHANGE, SENSITIVITY_STEPS_WITHIN, SENSITIVITY_WITHIN

Place = tuple[int, int]


class Trend(Enum):
    """Of the share of good settings as the batch grows."""

    GROWS = "grows"
    SHRINKS = "shrinks"
    LEVEL = "no clear trend"
    UNKNOWN = "cannot be decided"


@dataclass(frozen=True)
class Grid:
    """Two axes of settings and what each point gave.

    Args:
        names: of the axes.
        rows, columns: values of the first and of the second axis, rising.
        records: by (row, column); points that were not run are absent.
        tuned: the point that was chosen; None where every point diverged or failed.
    """

    names: tuple[str, str]
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    records: dict[Place, Record]
    tuned: Place | None

    def edges(self) -> list[str]:
        """On which axes of at least three values the tuned point is the first or the last."""
        found = []
        for name, values, index in zip(self.names, (self.rows, self.columns), self.tuned or (), strict=False):
            if len(values) > 2 and index in (0, len(values) - 1):
                found.append(f"{name} {values[index]:g} is the {'smallest' if index == 0 else 'largest'}")
        return found


def grid_of(cell: Cell, others: Sequence[Cell] = ()) -> Grid:
    """The grid of a cell.

    Args:
        others: cells of the same method and task: values that only they have run yet belong to the axes too.
    """
    records = [record for each in (cell, *others) for record in each.grid]
    first, second = list(records[0].settings)
    rows = tuple(sorted({record.settings[first] for record in records}))
    columns = tuple(sorted({record.settings[second] for record in records}))

    def place(settings: Mapping[str, float]) -> Place:
        return rows.index(settings[first]), columns.index(settings[second])

    points = {place(record.settings): record for record in cell.grid}
    return Grid((first, second), rows, columns, points, place(cell.tuned) if cell.tuned else None)


def share_of_loss(cell: Cell, within: float = SENSITIVITY_WITHIN) -> float | None:
    """The share of the grid whose final training loss is at most `within` times the lowest.

    Returns:
        None where every point diverged or failed: there is no best.
    """
    return _share([record.loss for record in cell.grid], within)


def share_of_steps(cell: Cell, within: float) -> float | None:
    """The share of the grid, all of it, that reaches the target in at most `within` times the fewest steps.

    Returns:
        None where no point reached the target: there is no best.
    """
    return _share([to_target(record) for record in cell.grid], within)


def share_reached(cell: Cell) -> float:
    """The share of the grid that reaches the target at all."""
    return sum(math.isfinite(to_target(record)) for record in cell.grid) / len(cell.grid)


def _share(values: Sequence[float], within: float) -> float | None:
    best = min(values)
    if not math.isfinite(best):
        return None
    return sum(math.isfinite(value) and value <= within * best for value in values) / len(values)


def shares_of_loss(cells: Sequence[Cell], within: float = SENSITIVITY_WITHIN) -> dict[int, float | None]:
    """By batch size; grids smaller than the largest of these cells are not whole yet and have no share."""
    return _of_whole_grids(cells, partial(share_of_loss, within=within))


def shares_of_steps(cells: Sequence[Cell], within: float = SENSITIVITY_STEPS_WITHIN) -> dict[int, float | None]:
    """The same of steps to the target."""
    return _of_whole_grids(cells, partial(share_of_steps, within=within))


def shares_reached(cells: Sequence[Cell]) -> dict[int, float | None]:
    """The same of reaching the target at all."""
    return _of_whole_grids(cells, share_reached)


def _of_whole_grids(cells: Sequence[Cell], share: Callable[[Cell], float | None]) -> dict[int, float | None]:
    whole = max((len(cell.grid) for cell in cells), default=0)
    return {cell.batch_size: share(cell) if len(cell.grid) == whole else None for cell in cells}


def share_trend(shares: Mapping[int, float | None]) -> tuple[Trend, float]:
    """Whether the share of good settings changes with the batch size.

    Returns:
        The trend, and by how much a line, fitted against log2 of the batch size, changes over the range.
    """
    points = [(math.log2(size), share) for size, share in sorted(shares.items()) if share is not None]
    if len(points) < 3:
        return Trend.UNKNOWN, 0.0
    middle = sum(x for x, _ in points) / len(points)
    slope = sum((x - middle) * y for x, y in points) / sum((x - middle) ** 2 for x, _ in points)
    change = slope * (points[-1][0] - points[0][0])
    if abs(change) < SENSITIVITY_CHANGE:
        return Trend.LEVEL, change
    return (Trend.GROWS if change > 0 else Trend.SHRINKS), change


@dataclass(frozen=True)
class Dispersion:
    """Of final training losses over a grid and its seeds.

    Args:
        ratio: third quartile over first; None with fewer than four losses.
        lost: runs that diverged or failed, which have no loss.
        runs: all of them.
    """

    ratio: float | None
    lost: int
    runs: int


def dispersion(cell: Cell) -> Dispersion:
    records = {record.id: record for record in (*cell.grid, *cell.runs)}.values()
    losses = [record.loss for record in records if math.isfinite(record.loss)]
    ratio = None
    if len(losses) >= 4:
        low, _, high = quantiles(losses, n=4, method="inclusive")
        ratio = high / low if low > 0 else None
    return Dispersion(ratio, len(records) - len(losses), len(records))


def tuned_at_edges(study: Study) -> list[tuple[str, str, int, str]]:
    """Task, method, batch size and where: each tuned point that lies at an edge of its grid."""
    return [
        (*key, where) for key, cell in study.cells.items() for where in grid_of(cell, study.of_method(*key[:2])).edges()
    ]
