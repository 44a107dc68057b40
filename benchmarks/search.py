"""For each optimizer the learning rate and the fewest steps that end at a target, with a schedule fitted to them.

With a decaying schedule the loss falls at the end, so stopping a long run early is unfair to the slower method and
letting it run on is unfair to the faster one. Every optimizer gets grids of learning rates of equal size, extended
while the best is at an edge, and one grid of horizons.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from contenders import Contender
from run_store import Point, Store, loss_of

Runner = Callable[[Contender, float, int, int], dict[str, Any]]
STEPS_OF_LADDER = (1.0, 2.0, 3.0, 6.0)
GRID = 4  # learning rates that everybody gets at the longest horizon; three at the others
LOWEST, HIGHEST = -24, 8  # of the ladder: 1e-6 to 100
RATIO = 1.2  # of neighbouring horizons


class Missing(LookupError):
    """A run that is needed and not in the store."""


def rate(index: int) -> float:
    """The ladder of learning rates: ..., 1e-3, 2e-3, 3e-3, 6e-3, 1e-2, ..."""
    decade, place = divmod(index, len(STEPS_OF_LADDER))
    return float(f"{STEPS_OF_LADDER[place] * 10.0**decade:.3g}")


def place(lr: float) -> int:
    """Of the ladder's value nearest to ``lr``."""
    return min(range(LOWEST, HIGHEST + 1), key=lambda index: abs(math.log(rate(index) / lr)))


def horizons(longest: int) -> list[int]:
    """Steps from a twentieth of the longest on, each 1.2 times the one before."""
    found, value = [], float(longest)
    while value >= max(8.0, longest / 20):
        found.append(round(value))
        value /= RATIO
    return sorted(set(found))


class Search:
    """The runs of one contender on one task; none is done twice, and what the store has is not done at all.

    Args:
        runner: of contender, learning rate, horizon and seed; returns ``loss`` and ``curve``. None raises ``Missing``.
        where: machine and commit, kept with every run.
    """

    def __init__(
        self,
        store: Store,
        contender: Contender,
        longest: int,
        threads: int,
        runner: Runner | None = None,
        where: dict[str, Any] | None = None,
    ) -> None:
        self.store, self.contender, self.longest, self.threads = store, contender, longest, threads
        self.runner, self.where = runner, where or {}
        self.horizons = horizons(longest)
        self._best: dict[int, int] = {}  # horizon -> place of its best learning rate
        self._tried: dict[int, list[int]] = {}  # horizon -> places that were tried for it

    def row(self, lr: float, horizon: int, seed: int = 0) -> dict[str, Any]:
        """From the store, else from a run.

        Raises:
            Missing: it is not there, and there is no runner.
        """
        contender = self.contender
        found = self.store.get(Point.of(contender.options, lr, horizon, seed, self.threads))
        if found is not None:
            return found
        if self.runner is None:
            raise Missing(
                f"{contender.name}: lr {lr:g}, {horizon} steps, seed {seed} is not in {self.store.lines.path}"
            )
        result = self.runner(contender, lr, horizon, seed)
        found = {
            "contender": contender.name,
            "options": dict(contender.options),
            "lr": lr,
            "horizon": horizon,
            "seed": seed,
            "threads": self.threads,
            **result,
            **self.where,
        }
        self.store.put(found)
        print(f"{contender.name}: lr {lr:g}, {horizon} steps, seed {seed}: {loss_of(found):.5g}", file=sys.stderr)
        return found

    def loss(self, lr: float, horizon: int, seed: int = 0) -> float:
        return loss_of(self.row(lr, horizon, seed))

    def best(self, horizon: int) -> tuple[float, float]:
        """Learning rate and loss of the best of the grid, extended while that is at an edge."""
        index = self._walk(horizon, -math.inf)
        return rate(index), self.loss(rate(index), horizon)

    def reaches(self, horizon: int, target: float) -> float | None:
        """A learning rate whose run ends at or below the target, the likeliest first; None if the grid has none."""
        index = self._walk(horizon, target)
        return rate(index) if self.loss(rate(index), horizon) <= target else None

    def _walk(self, horizon: int, target: float) -> int:
        """The best place of the extended grid, or the first that reaches the target."""
        tried: list[int] = []
        todo = self._start(horizon)
        while todo:
            for index in todo:
                tried.append(index)
                if self.loss(rate(index), horizon) <= target:
                    return index
            best = min(tried, key=lambda index: self.loss(rate(index), horizon))
            beyond = {min(tried): best - 1, max(tried): best + 1}.get(best)
            todo = [] if beyond is None or not LOWEST <= beyond <= HIGHEST else [beyond]
        self._best[horizon], self._tried[horizon] = best, tried
        return best

    def _start(self, horizon: int) -> list[int]:
        if horizon == self.longest:
            first = place(self.contender.start)
            return list(range(first, first + GRID))
        # the best of the next longer horizon that was searched, then its neighbours
        if self.longest not in self._best:
            self.best(self.longest)
        centre = self._best[min(known for known in self._best if known > horizon)]
        return [index for index in (centre, centre + 1, centre - 1) if LOWEST <= index <= HIGHEST]

    def fewest(self, target: float) -> int | None:
        """The fewest steps of the grid that end at or below the target, by bisection; None if the longest do not.

        A longer horizon with its own best learning rate never ends higher, up to noise.
        """
        if self.best(self.longest)[1] > target:
            return None
        low, high = 0, len(self.horizons) - 1
        while low < high:
            middle = (low + high) // 2
            if self.reaches(self.horizons[middle], target) is not None:
                high = middle
            else:
                low = middle + 1
        return self.horizons[high]

    def confirmed(self, targets: list[float]) -> tuple[float, int] | None:
        """Learning rate and the fewest steps with which every seed ends at or below its own target.

        Args:
            targets: by seed; the first is searched for, and the horizon grows until the others hold too. Where they
                never do, the point of the first.
        """
        steps = self.fewest(targets[0])
        if steps is None:
            return None
        for horizon in self.horizons[self.horizons.index(steps) :]:
            self.best(horizon)
            # the best learning rate of one seed may be more than another bears
            for index in sorted(self._tried[horizon], key=lambda index: self.loss(rate(index), horizon)):
                if all(self.loss(rate(index), horizon, seed) <= target for seed, target in enumerate(targets)):
                    return rate(index), horizon
        return self.best(steps)[0], steps
