"""When roots are refreshed and when they are swapped in: a pure function of the step and of block names and shapes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

from lightning_soo.checks import require_whole_number
from lightning_soo.naming import nearest
from lightning_soo.placement.assignment import assign
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.costs import refresh_milliseconds

# the first roots are computed from no less, whatever the interval of the statistics: two or three gradients give roots
# that end a short run far worse (autoencoder of the papers, 48 steps: 187 instead of 141)
_FIRST_GRADIENTS = 8
# stale roots cost progress early, when statistics change fast (benchmarks/NOTES.md)
GROWING: Mapping[str, float] = {"first": 2, "growth": 1.15, "max": 100}
# roots of four gradients and fewer end a short run worse, later ones leave more steps to the graft alone
# (benchmarks/NOTES.md)
_FIRST_REFRESH = 5
# share of an interval in which background work has to be done; roots that wait longer are staler for nothing
_DELAY_SHARE = 8

# as good as every step in all that was measured, at a tenth of the cost
RAREST_STATISTICS = 10


def statistics_within(interval: int) -> int:
    """Steps between two updates of the statistics where they follow the interval of refreshes: a tenth of it."""
    return max(1, interval // 10)


def delay_within(interval: int) -> int:
    """Steps between the start of a refresh and its use where nothing else is asked for."""
    return max(1, interval // _DELAY_SHARE)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Steps between two refreshes of a block: a number, or one that starts short and grows.

    Attributes:
        first: the first interval.
        growth: each interval is this times the one before, rounded.
        max: where growth ends.
    """

    first: int
    growth: float = 1.0
    max: int

    def __post_init__(self) -> None:
        for name in ("first", "max"):
            require_whole_number(f"precondition_frequency: {name}", getattr(self, name), minimum=1)
        if self.max < self.first:
            raise ValueError(f"precondition_frequency: max={self.max} is below first={self.first}")
        if not isinstance(self.growth, int | float) or not 1 <= self.growth < math.inf:
            raise ValueError(f"precondition_frequency: growth={self.growth!r}: must be a finite number of at least 1")
        if self.max > self.first and not self.growth > 1:
            raise ValueError(f"precondition_frequency: growth={self.growth!r} never reaches max={self.max}")

    @classmethod
    def parse(cls, value: int | Interval | Mapping[str, Any]) -> Interval:
        """Take a number, or a mapping of the fields."""
        if isinstance(value, Interval):
            return value
        if not isinstance(value, Mapping):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"precondition_frequency={value!r}: must be a whole number of at least 1, or a mapping such as "
                    "{'first': 5, 'growth': 1.5, 'max': 100}"
                )
            return cls(first=value, max=value)
        names = [entry.name for entry in fields(cls)]
        for key in value:
            if key not in names:
                raise ValueError(f"precondition_frequency: unknown key {key!r}{nearest(str(key), names)}")
        missing = [name for name in ("first", "growth", "max") if name not in value]
        if missing:
            raise ValueError(f"precondition_frequency={dict(value)!r}: {missing[0]!r} is missing")
        return cls(**value)

    @property
    def grows(self) -> bool:
        return self.first < self.max

    def short_lengths(self) -> list[int]:
        """Every interval before the first that has its full length."""
        lengths, length = [], float(self.first)
        while round(length) < self.max:
            lengths.append(round(length))
            length *= self.growth
        return lengths

    def __str__(self) -> str:
        return f"{self.first}, growing x {self.growth:g} to {self.max}" if self.grows else str(self.max)


def first_refresh(interval: Interval, asked: int | None) -> int:
    """Step of the first refresh: as asked for, else 5, or the (longest) interval where that is less."""
    return min(_FIRST_REFRESH, interval.max) if asked is None else asked


@dataclass(frozen=True, kw_only=True)
class RefreshSchedule:
    """The clock of refreshes; steps count from 1 and skipped steps do not count.

    Attributes:
        interval: steps between two refreshes of a block.
        delay: a refresh started at step ``t`` is used from step ``t + delay`` on; 0 means at once. None is an eighth
            of the interval around ``t``, at least 1, but 0 for the first refresh: without it the graft alone would move
            meanwhile, and what a large learning rate does then is not made good (the autoencoder of the papers, 400
            steps, ended at 150 instead of 66). Refreshes are spread over the interval, so each has all the workers'
            time to itself.
        start: step of every block's first refresh.
        gather: roots change hands only at multiples of this; 1 means as soon as the delay is over.
        statistics: steps between two updates of the statistics.
        statistics_follow: whether they are a tenth of the interval that the step is in, where that is less.
        offsets: block key -> position in the longest interval; all 0 without staggering.
    """

    interval: Interval
    delay: int | None
    start: int
    gather: int = 1
    statistics: int = 1
    statistics_follow: bool = False
    offsets: dict[str, int]
    _starts: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    def observes(self, step: int) -> bool:
        """Whether statistics are updated: at step 1, at every multiple of ``statistics``, and in each of the last
        steps before the first refresh."""
        if step == 1 or self.start - _FIRST_GRADIENTS < step <= self.start:
            return True
        every = self.statistics
        if self.statistics_follow and step > self.start:
            every = min(every, statistics_within(self._around(step)[1]))
        return step % every == 0

    def observed_before(self, step: int) -> int:
        """The step of the observation before this one; 0 before the first."""
        return next((earlier for earlier in range(step - 1, 0, -1) if self.observes(earlier)), 0)

    def refreshes(self, key: str, step: int) -> bool:
        """Whether a refresh of this block starts.

        At ``start``. With a constant interval then wherever ``(step - offset)`` is a multiple of it; a staggered block
        whose turn comes less than half an interval after ``start`` waits for the next one: its roots are fresh. With a
        growing one, once in every interval, at the same share of it.
        """
        if step <= self.start:
            return step == self.start
        offset = self.offsets.get(key, 0)
        if self.interval.grows:
            begin, length = self._around(step)
            return begin > self.start and step == begin + offset * length // self.interval.max
        length = self.interval.max
        return (step - offset) % length == 0 and (offset == 0 or 2 * (step - self.start) >= length)

    def refresh_steps(self, key: str, last: int) -> list[int]:
        """All steps up to ``last`` at which :meth:`refreshes` is true."""
        offset, longest = self.offsets.get(key, 0), self.interval.max
        if self.interval.grows:
            starts = self._starts or self._starts_until_max()
            begins = [*starts[1:], *range(starts[-1] + longest, last + 1, longest)]
            turns = [begin + offset * self._around(begin)[1] // longest for begin in begins]
        else:
            turns = list(range(offset, last + 1, longest))
        return [step for step in sorted({self.start, *turns}) if step <= last and self.refreshes(key, step)]

    def is_settled(self, step: int) -> bool:
        """Whether the interval has stopped growing."""
        return not self.interval.grows or step >= (self._starts or self._starts_until_max())[-1]

    def swap_step(self, step: int) -> int:
        """First step that uses the roots of a refresh started at ``step``."""
        delay = self.delay
        if delay is None:
            delay = 0 if step == self.start else delay_within(self._around(step)[1])
        return -(-(step + delay) // self.gather) * self.gather

    def _around(self, step: int) -> tuple[int, int]:
        """First step and length of the interval that holds ``step``; the first one begins at ``start``."""
        if not self.interval.grows:
            return step - step % self.interval.max, self.interval.max
        starts = self._starts or self._starts_until_max()
        if step >= starts[-1]:
            return step - (step - starts[-1]) % self.interval.max, self.interval.max
        index = bisect_right(starts, step) - 1
        return starts[index], starts[index + 1] - starts[index]

    def _starts_until_max(self) -> list[int]:
        """First steps of the intervals, up to the first that has its full length."""
        self._starts.extend(accumulate(self.interval.short_lengths(), initial=self.start))
        return self._starts


def stagger_offsets(blocks: Sequence[Block], frequency: int) -> dict[str, int]:
    """Spread refreshes over the interval so that every step carries about the same work."""
    ordered = sorted(blocks, key=lambda block: block.key)
    slots = assign([refresh_milliseconds(block) for block in ordered], frequency)
    used = max(slots, default=0) + 1  # fewer than steps where there are few blocks: an even distance apart
    return {block.key: slot * frequency // used for block, slot in zip(ordered, slots, strict=True)}
