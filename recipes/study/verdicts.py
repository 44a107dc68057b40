"""What the numbers decide: who needs less than the best first-order method, what scales, and the rows of the table.

All rules are those of ``thresholds.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from cells import Cell, Spread, Study
from scaling import Reach, Scaling
from thresholds import (
    CRITICAL_RATIO,
    LEAST_SEEDS,
    LEAST_SIZES,
    NOISE_SPREADS,
    SCALABLE_MULTIPLE,
    SUCCESS_SECONDS,
    SUCCESS_STEPS,
)


class Outcome(Enum):
    """One spread against another."""

    LESS = "less"
    MORE = "more"
    SAME = "no difference beyond the spread"
    NEITHER = "neither reaches the target"
    UNDECIDED = "cannot be decided"


def compare(ours: Spread, theirs: Spread) -> Outcome:
    """Whether `ours` needs less than `theirs`, more, or neither beyond the spread of the seeds.

    One that reaches the target beats one that does not, if all of its seeds do or none of the other's.
    """
    if not ours.found and not theirs.found:
        return Outcome.NEITHER
    if any(0 < spread.count < LEAST_SEEDS for spread in (ours, theirs)):
        return Outcome.UNDECIDED
    if ours.found != theirs.found:
        winner, loser = (ours, theirs) if ours.found else (theirs, ours)
        sure = winner.reached == winner.count or loser.reached == 0
        return Outcome.SAME if not sure else Outcome.LESS if ours.found else Outcome.MORE
    if abs(ours.median - theirs.median) <= NOISE_SPREADS * max(ours.width, theirs.width):
        return Outcome.SAME
    return Outcome.LESS if ours.median < theirs.median else Outcome.MORE


@dataclass(frozen=True)
class Comparison:
    """A second-order method against the best first-order one.

    Args:
        measure: one of ``records.CLOCKS``.
        ours, theirs: at the same batch size, or each at its own best one.
    """

    measure: str
    ours: Cell
    theirs: Cell

    @property
    def outcome(self) -> Outcome:
        return compare(self.ours.to_target(self.measure), self.theirs.to_target(self.measure))

    @property
    def times(self) -> float | None:
        """How many times as much the first-order method needs; None where one of them does not reach the target."""
        ours, theirs = self.ours.to_target(self.measure), self.theirs.to_target(self.measure)
        return theirs.median / ours.median if ours.found and theirs.found else None

    @property
    def success(self) -> bool:
        """Less beyond the spread, and by as much as ``thresholds.py`` asks of this measure."""
        share = SUCCESS_STEPS if self.measure in ("steps", "samples") else SUCCESS_SECONDS
        return self.outcome is Outcome.LESS and (self.times is None or self.times >= 1 / share)


def cheapest(cells: Sequence[Cell], measure: str) -> Cell | None:
    """The cell with the least median to the target; where none reaches it, the first; None without cells."""

    def needed(cell: Cell) -> float:
        spread = cell.to_target(measure)
        return spread.median if spread.found else math.inf

    return min(cells, key=needed, default=None)


def at_same_batch_size(
    study: Study, task: str, method: str, orders: Mapping[str, int], measure: str
) -> list[Comparison]:
    """With the best first-order method of each batch size, in rising order; sizes without one are left out."""
    found = []
    for cell in study.of_method(task, method):
        rivals = [c for c in study.at(task, cell.batch_size) if orders[c.method] == 1]
        best = cheapest(rivals, measure)
        if best is not None:
            found.append(Comparison(measure, cell, best))
    return found


def at_best_batch_size(
    study: Study, task: str, orders: Mapping[str, int], measure: str, method: str | None = None
) -> Comparison | None:
    """The least that second order needs at any batch size, and the least that first order does.

    Args:
        method: of second order; None: the best of them.
    """
    mine = [cell for cell in study.cells.values() if cell.task == task]
    ours = cheapest([c for c in mine if orders[c.method] == 2 and method in (None, c.method)], measure)
    theirs = cheapest([c for c in mine if orders[c.method] == 1], measure)
    return None if ours is None or theirs is None else Comparison(measure, ours, theirs)


class Finding(Enum):
    """Whether the published finding is seen: beyond a critical batch size it scales no better than SGD."""

    SEEN = "seen"
    NOT_SEEN = "not seen"
    UNDECIDED = "cannot be decided here"


def scales_no_better(method: Scaling | None, sgd: Scaling | None) -> tuple[Finding, str]:
    """Whether scaling of `method` stops, not clearly later than that of `sgd`.

    Seen: the method's scaling stops within the batch sizes that were run, at no more than CRITICAL_RATIO times SGD's
    critical batch size, by the medians and for more than half of the seeds. Not seen: SGD's stops and the method's goes
    on to more than CRITICAL_RATIO times that, by the medians and for every seed.

    Returns:
        The finding, and why it cannot be decided ("" where it can).
    """
    if method is None or sgd is None:
        return Finding.UNDECIDED, "not run"
    if not (method.decided and sgd.decided):
        return Finding.UNDECIDED, f"fewer than {LEAST_SIZES} batch sizes"
    if method.reach is None or sgd.reach is None:
        return Finding.UNDECIDED, "no target at the smallest batch size"
    seeds = {*method.by_seed} & {*sgd.by_seed}
    if len(seeds) < LEAST_SEEDS:
        return Finding.UNDECIDED, f"fewer than {LEAST_SEEDS} seeds that ran every batch size"
    whole = _later(method.reach, sgd.reach, method.largest)
    each = [_later(method.by_seed[seed], sgd.by_seed[seed], method.largest) for seed in seeds]
    if whole is None:
        return Finding.UNDECIDED, "batch sizes end too early"
    if whole:
        return (Finding.NOT_SEEN, "") if all(each) else (Finding.UNDECIDED, "seeds disagree")
    return (Finding.SEEN, "") if 2 * each.count(False) > len(each) else (Finding.UNDECIDED, "seeds disagree")


def _later(ours: Reach, theirs: Reach, largest: int) -> bool | None:
    """Whether our scaling stops clearly later; None where neither stops, or ours is not seen to go far enough."""
    if not theirs.stops:
        return False if ours.stops else None
    if min(ours.critical, largest) > CRITICAL_RATIO * theirs.critical:
        return True
    return False if ours.stops else None


class Scalable(Enum):
    YES = "yes"
    PARTLY = "partly"
    NO = "no"
    UNDECIDED = "cannot be decided"


def scalable_on(scaling: Scaling) -> Scalable:
    """Whether one method scales to SCALABLE_MULTIPLE times the smallest batch size of one task."""
    if not scaling.decided:
        return Scalable.UNDECIDED
    if scaling.reach is None:
        return Scalable.NO
    if scaling.reach.holds >= SCALABLE_MULTIPLE * scaling.smallest:
        return Scalable.YES
    return Scalable.NO if scaling.largest >= SCALABLE_MULTIPLE * scaling.smallest else Scalable.UNDECIDED


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        reached: of each task, batch sizes at which the target was reached and batch sizes run.
        successes: of each task and measure (steps, seconds), batch sizes with a success and those compared; empty for
            first order, which is what is compared with.
        scaling: of each task.
        finding: of each task; empty for first order.
    """

    method: str
    order: int
    reached: dict[str, tuple[int, int]]
    successes: dict[str, dict[str, tuple[int, int]]]
    scaling: dict[str, Scaling]
    finding: dict[str, Finding]

    @property
    def scalable(self) -> Scalable:
        """Over the tasks: yes on most, partly on at least one, else no; undecided tasks could still be yes."""
        found = [scalable_on(scaling) for scaling in self.scaling.values()]
        yes, unknown = found.count(Scalable.YES), found.count(Scalable.UNDECIDED)
        if 2 * yes > len(found):
            return Scalable.YES
        if 2 * (yes + unknown) > len(found):
            return Scalable.UNDECIDED
        return Scalable.PARTLY if yes else Scalable.UNDECIDED if unknown else Scalable.NO


def table(
    study: Study,
    orders: Mapping[str, int],
    scaling: Mapping[tuple[str, str], Scaling],
    methods: Sequence[str],
    tasks: Sequence[str],
    sgd: str = "sgd",
) -> list[Entry]:
    """The rows, in the order of `methods`. Args: sgd: the method that the published finding compares with."""
    entries = []
    for method in methods:
        entry = Entry(method, orders[method], {}, {}, {}, {})
        for task in (task for task in tasks if study.of_method(task, method)):
            cells = study.of_method(task, method)
            entry.reached[task] = sum(cell.to_target().found for cell in cells), len(cells)
            entry.scaling[task] = scaling[task, method]
            if entry.order == 2:
                entry.successes[task] = {}
                for measure in ("steps", "seconds"):
                    found = at_same_batch_size(study, task, method, orders, measure)
                    entry.successes[task][measure] = sum(c.success for c in found), len(found)
                entry.finding[task] = scales_no_better(entry.scaling[task], scaling.get((task, sgd)))[0]
        entries.append(entry)
    return entries
