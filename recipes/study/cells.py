"""The rows of the study by task, method and batch size: the grid, the tuned point and its seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from records import Record, seeds_of, tuned
from thresholds import REACHED_SEEDS


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest over seeds; a seed that did not reach the target counts as infinite.

    Args:
        count: seeds; 0 where every point of the grid diverged or failed.
        reached: seeds that reached the target.
    """

    median: float
    low: float
    high: float
    count: int
    reached: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = sorted(values)
        if not found:
            return cls(math.inf, math.inf, math.inf, 0, 0)
        return cls(median(found), found[0], found[-1], len(found), sum(map(math.isfinite, found)))

    @property
    def found(self) -> bool:
        """Enough seeds reached the target."""
        return self.count > 0 and math.isfinite(self.median) and self.reached >= REACHED_SEEDS * self.count

    @property
    def width(self) -> float:
        """Largest less smallest; infinite where some seeds did not reach the target."""
        return self.high - self.low if math.isfinite(self.high) else math.inf


def to_target(record: Record, measure: str = "steps") -> float:
    """What the run needed to reach the target; infinite where it did not."""
    return math.inf if record.error or record.reached is None else float(record.reached[measure])


@dataclass(frozen=True)
class Cell:
    """One method on one task at one batch size.

    Args:
        grid: a run for each point of the grid that was run.
        runs: the tuned point, a run for each seed in the order of the seeds; none where every point diverged or failed.
    """

    task: str
    method: str
    batch_size: int
    grid: tuple[Record, ...]
    runs: tuple[Record, ...]

    @property
    def tuned(self) -> dict[str, float] | None:
        return dict(self.runs[0].settings) if self.runs else None

    def to_target(self, measure: str = "steps") -> Spread:
        """Over the seeds of the tuned point. Args: measure: one of ``records.CLOCKS``."""
        return Spread.of(to_target(run, measure) for run in self.runs)

    def spent(self, measure: str = "steps") -> float:
        """A run's whole budget: where the target was not reached, more than this is needed."""
        whole = [float(getattr(run, measure)) for run in self.runs if not (run.diverged or run.error)]
        return median(whole) if whole else max(float(getattr(run, measure)) for run in self.grid)

    def final_losses(self) -> list[float]:
        """Training loss at the end, of each seed."""
        return [run.loss for run in self.runs]


@dataclass(frozen=True)
class Study:
    """Args: records: each run once, the latest row of it; cells: by task, method and batch size."""

    records: tuple[Record, ...]
    cells: dict[tuple[str, str, int], Cell]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Study:
        """Cells without a run of the grid are left out: seeds alone say nothing about what was tuned."""
        latest = {record.id: record for record in records}
        groups: dict[tuple[str, str, int], list[Record]] = {}
        for record in latest.values():
            groups.setdefault(record.cell, []).append(record)
        cells = {}
        for key, group in sorted(groups.items()):
            grid = [record for record in group if record.stage == "grid"]
            if not grid:
                continue
            point = tuned(grid)
            seeds = {run.seed: run for run in seeds_of(group, point)} if point else {}
            cells[key] = Cell(*key, tuple(grid), tuple(seeds[seed] for seed in sorted(seeds)))
        return cls(tuple(latest.values()), cells)

    def tasks(self, order: Sequence[str] = ()) -> list[str]:
        """Names of the tasks in `order`, then of those that it lacks."""
        return _ordered({task for task, _, _ in self.cells}, order)

    def methods(self, order: Sequence[str] = ()) -> list[str]:
        """Names of the methods in `order`, then of those that it lacks."""
        return _ordered({method for _, method, _ in self.cells}, order)

    def batch_sizes(self, task: str) -> list[int]:
        return sorted({size for name, _, size in self.cells if name == task})

    def of_method(self, task: str, method: str) -> list[Cell]:
        """By batch size, the smallest first; sizes without runs are left out."""
        return [cell for key, cell in sorted(self.cells.items()) if key[:2] == (task, method)]

    def at(self, task: str, batch_size: int) -> list[Cell]:
        """Every method on one task at one batch size."""
        return [cell for cell in self.cells.values() if (cell.task, cell.batch_size) == (task, batch_size)]


def _ordered(found: set[str], order: Sequence[str]) -> list[str]:
    return [name for name in order if name in found] + sorted(found - {*order})
