"""How steps to the target fall as the batch grows, and where that ends: the critical batch size.

The *efficiency* of a batch size B is ``steps(B0) B0 / (steps(B) B)``: samples to the target at the smallest batch size
over samples at this one. It is 1 on the line of ideal scaling. The critical batch size is where it falls below one
half, on a straight line between batch sizes (both axes logarithmic). Where steps are ``least (1 + critical / B)``, as
McCandlish et al. (2018, equation 2.11) find, that is their critical batch size (for small B0).

A run's budget is ``log2(B / B0) + 1`` times that at B0, in samples. So where the target is out of reach at B but not
at B0, efficiency is at most ``1 / (log2(B / B0) + 1)``, one half or less; the budget then stands for the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cells import Cell, Study, to_target
from thresholds import LEAST_SIZES, SCALABLE_EFFICIENCY


@dataclass(frozen=True)
class Point:
    """Args: steps: to the target; where it was not reached, the whole budget, which is too few."""

    batch_size: int
    steps: float
    reached: bool = True


@dataclass(frozen=True)
class Reach:
    """How far scaling goes.

    Args:
        holds: the largest batch size that was run with efficiency of at least one half.
        critical: where efficiency falls below that; infinite where it does not within the batch sizes that were run.
    """

    holds: int
    critical: float

    @property
    def stops(self) -> bool:
        return math.isfinite(self.critical)


def efficiencies(points: Sequence[Point], smallest: int) -> dict[int, float]:
    """By batch size; upper bounds where the target was not reached.

    Args:
        smallest: the batch size B0 of the task.

    Returns:
        Nothing where B0 was not run or did not reach the target: there is nothing to compare with.
    """
    base = next((p.steps * smallest for p in points if p.batch_size == smallest and p.reached), None)
    return {} if base is None else {p.batch_size: base / (p.steps * p.batch_size) for p in points}


def reach_of(points: Sequence[Point], smallest: int, least: float = SCALABLE_EFFICIENCY) -> Reach | None:
    """How far scaling goes; None where B0 was not run or did not reach the target.

    Args:
        points: in rising order of batch sizes.
    """
    efficiency = efficiencies(points, smallest)
    if not efficiency:
        return None
    last = max(i for i, p in enumerate(points) if p.reached and efficiency[p.batch_size] >= least)
    here = points[last].batch_size
    if last == len(points) - 1:
        return Reach(here, math.inf)
    there = points[last + 1].batch_size
    high, low = efficiency[here], efficiency[there]
    part = math.log(high / least) / math.log(high / low) if low < least else 0.0
    return Reach(here, here * (there / here) ** part)


@dataclass(frozen=True)
class Scaling:
    """One method on one task.

    Args:
        smallest: the batch size B0 of the task.
        sizes: batch sizes that were run.
        reach: of medians over the seeds; None where B0 did not reach the target.
        by_seed: the same of each seed's own runs, where it reached the target at B0.
    """

    smallest: int
    sizes: tuple[int, ...]
    reach: Reach | None
    by_seed: dict[int, Reach]

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def decided(self) -> bool:
        """There are enough batch sizes to say where scaling stops."""
        return len(self.sizes) >= LEAST_SIZES and self.smallest in self.sizes


def scaling_of(cells: Sequence[Cell], smallest: int) -> Scaling:
    """Args: cells: of one task and method, in rising order of batch sizes. smallest: the batch size B0 of the task."""
    medians = []
    for cell in cells:
        spread = cell.to_target()
        medians.append(_point(cell, spread.median if spread.found else math.inf))
    by_seed = {}
    for seed in sorted({run.seed for cell in cells for run in cell.runs}):
        steps = {cell.batch_size: to_target(run) for cell in cells for run in cell.runs if run.seed == seed}
        mine = [_point(cell, steps.get(cell.batch_size, math.inf)) for cell in cells]
        whole = all(cell.batch_size in steps or not cell.runs for cell in cells)
        if whole and (found := reach_of(mine, smallest)) is not None:
            by_seed[seed] = found
    return Scaling(smallest, tuple(cell.batch_size for cell in cells), reach_of(medians, smallest), by_seed)


def _point(cell: Cell, steps: float) -> Point:
    reached = math.isfinite(steps)
    return Point(cell.batch_size, steps if reached else max(cell.spent(), 1.0), reached)


def scalings(study: Study) -> dict[tuple[str, str], Scaling]:
    """By task and method."""
    names = sorted({key[:2] for key in study.cells})
    return {(t, m): scaling_of(study.of_method(t, m), study.batch_sizes(t)[0]) for t, m in names}


def own_speed_up(cells: Sequence[Cell], smallest: int, measure: str = "steps") -> dict[int, float]:
    """What the method needed at `smallest` over what it needs at each batch size that reached the target.

    Args:
        smallest: the batch size B0 of the task; nothing is returned where it did not reach the target.
    """
    spreads = {cell.batch_size: cell.to_target(measure) for cell in cells}
    if smallest not in spreads or not spreads[smallest].found:
        return {}
    return {size: spreads[smallest].median / spread.median for size, spread in spreads.items() if spread.found}
