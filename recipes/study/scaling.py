"""How steps to the target fall as the batch grows, and where that ends: the critical batch size.

The *efficiency* of a batch size B is ``steps(B0) B0 / (steps(B) B)``: samples to the target at the smallest batch size
over samples at this one. It is 1 on the line of ideal scaling. Where steps are ``least (1 + critical / B)``, as
McCandlish et al. (2018, equation 2.11) find, it falls to one half at the critical batch size (from small B0).

A run's budget is ``log2(B / B0) + 1`` times that at B0, in samples. So where the target is out of reach at B but not
at B0, efficiency is at most ``1 / (log2(B / B0) + 1)``: one half or less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cells import Cell, Study, to_target
from thresholds import LEAST_SIZES, SCALABLE_EFFICIENCY


def efficiencies(steps: Mapping[int, float], smallest: int) -> dict[int, float]:
    """By batch size, from steps to the target: 0 where it was not reached.

    Args:
        steps: by batch size; infinite where the target was not reached.
        smallest: the batch size B0 of the task.

    Returns:
        Nothing where B0 was not run or did not reach the target: there is nothing to compare with.
    """
    base = steps.get(smallest, math.inf) * smallest
    if not math.isfinite(base):
        return {}
    return {size: base / (value * size) if math.isfinite(value) else 0.0 for size, value in sorted(steps.items())}


def critical_batch_size(efficiency: Mapping[int, float], least: float = SCALABLE_EFFICIENCY) -> int | None:
    """The largest batch size with an efficiency of at least `least`; None without efficiencies."""
    return max((size for size, value in efficiency.items() if value >= least), default=None)


@dataclass(frozen=True)
class Scaling:
    """One method on one task.

    Args:
        smallest: the batch size B0 of the task.
        sizes: batch sizes that were run.
        efficiency: of medians over the seeds; empty where B0 did not reach the target.
        by_seed: by seed, the critical batch size of its own runs, where it reached the target at B0.
    """

    smallest: int
    sizes: tuple[int, ...]
    efficiency: dict[int, float]
    by_seed: dict[int, int]

    @property
    def critical(self) -> int | None:
        """The largest batch size that still scales; None where B0 did not reach the target."""
        return critical_batch_size(self.efficiency)

    @property
    def decided(self) -> bool:
        """There are enough batch sizes to say where scaling stops."""
        return len(self.sizes) >= LEAST_SIZES and self.smallest in self.sizes

    @property
    def stops(self) -> bool:
        """Before the largest batch size that was run."""
        return self.critical is not None and self.critical < max(self.sizes)


def scaling_of(cells: Sequence[Cell], smallest: int) -> Scaling:
    """Args: cells: of one task and method. smallest: the batch size B0 of the task."""
    spreads = {cell.batch_size: cell.to_target() for cell in cells}
    medians = {size: spread.median if spread.found else math.inf for size, spread in spreads.items()}
    runs = {(run.seed, cell.batch_size): run for cell in cells for run in cell.runs}
    seeds = sorted({run.seed for cell in cells for run in cell.runs})
    by_seed = {}
    for seed in seeds:
        mine = {cell.batch_size: runs.get((seed, cell.batch_size)) for cell in cells}
        if all(run is not None or not cell.runs for cell, run in zip(cells, mine.values(), strict=True)):
            steps = {size: to_target(run) if run is not None else math.inf for size, run in mine.items()}
            if (size := critical_batch_size(efficiencies(steps, smallest))) is not None:
                by_seed[seed] = size
    return Scaling(smallest, tuple(sorted(spreads)), efficiencies(medians, smallest), by_seed)


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
