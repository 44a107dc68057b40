"""How long training waits for roots: the queue of one rank's workers, step by step.

A refresh is one job of one worker (deferred ones may be cut, so there this is an upper bound), is begun in the order in
which it was handed over, and is due at a step that was fixed in advance. That workers have time enough in all does not
mean that every result is there when it is due.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_soo.optim.options import ShampooOptions
from lightning_soo.refresh.schedule import Interval, RefreshSchedule
from lightning_soo.refresh.workers import choose_workers

_INTERVALS = 2  # over which a wait is averaged, after as many


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Who computes a rank's roots.

    Attributes:
        count: how many at a time.
        holds_training: whether training stands still while they work.
        in_the_step: whether a root is computed in the step that starts it, else in the first that needs one.
    """

    count: int
    holds_training: bool
    in_the_step: bool = False


@dataclass(frozen=True, kw_only=True)
class Load:
    """Refreshes of one rank.

    Attributes:
        seconds: block key -> what one worker takes.
        offsets: see :class:`lightning_soo.refresh.schedule.RefreshSchedule`; may have other blocks too.
    """

    options: ShampooOptions
    seconds: Mapping[str, float]
    offsets: Mapping[str, int]
    crew: Crew

    def settled_wait(self, step_seconds: float) -> float:
        """Seconds of a step on average, once intervals have their full length.

        Args:
            step_seconds: of a step that waits for nothing.
        """
        length = self.options.precondition_frequency.max
        schedule = self._schedule(Interval(first=length, max=length), start=1)
        found = waits(schedule, self.seconds, 2 * _INTERVALS * length, step_seconds, self.crew)
        return sum(wait for step, wait in found.items() if step > _INTERVALS * length) / (_INTERVALS * length)

    def early_wait(self, step_seconds: float) -> float:
        """Seconds in all, for the first roots and while intervals are still short."""
        interval, start = self.options.precondition_frequency, self.options.start
        last = start + sum(interval.short_lengths())
        found = waits(self._schedule(interval, start), self.seconds, last, step_seconds, self.crew)
        return sum(found.values())

    def _schedule(self, interval: Interval, start: int) -> RefreshSchedule:
        return RefreshSchedule(
            interval=interval,
            delay=self.options.refresh_delay,
            start=start,
            gather=self.options.gather_frequency or 1,
            offsets={key: self.offsets.get(key, 0) for key in self.seconds},
        )


def crew(options: ShampooOptions, cores: float, refresh_seconds: float) -> Crew:
    """As :func:`lightning_soo.refresh.workers.choose_workers` decides, with ``cores`` that training leaves free.

    Args:
        refresh_seconds: of all blocks that the rank refreshes.
    """
    if options.basis == "qr":
        return Crew(count=1, holds_training=True, in_the_step=True)
    available = max(1, int(cores))
    kind, count = choose_workers(
        options.workers,
        cores=available,
        spare=available,
        refresh_milliseconds=1000 * refresh_seconds,
        refresh_delay=options.refresh_delay,
    )
    return Crew(
        count=min(count, available), holds_training=kind in ("inline", "deferred"), in_the_step=kind == "inline"
    )


def waits(
    schedule: RefreshSchedule, seconds: Mapping[str, float], last: int, step_seconds: float, crew: Crew
) -> dict[int, float]:
    """Step -> seconds that training waits in it; steps up to ``last`` in which something starts or is due.

    Args:
        seconds: block key -> what one worker takes.
        step_seconds: of a step that waits for nothing.
    """
    starting: dict[int, list[tuple[int, float]]] = defaultdict(list)  # step -> when it is due, and its seconds
    for key in sorted(seconds):
        for step in schedule.refresh_steps(key, last):
            starting[step].append((schedule.swap_step(step), seconds[key]))
    steps = {*starting, *(due for rows in starting.values() for due, _ in rows)}
    now, before, found = 0.0, 0, {}
    free = [0.0] * crew.count  # when each worker is
    ready: dict[int, float] = {}  # step -> when all that is due in it is there
    waiting: list[tuple[int, float]] = []
    for step in sorted(step for step in steps if step <= last):
        now += (step - before) * step_seconds
        begin, before = now, step
        waiting += starting.get(step, ())
        if not crew.holds_training or crew.in_the_step or any(due <= step for due, _ in waiting):
            if crew.holds_training:
                free = [now] * crew.count
            for due, each in waiting:
                end = max(heapq.heappop(free), begin) + each
                heapq.heappush(free, end)
                ready[due] = max(ready.get(due, 0.0), end)
            waiting = []
            if crew.holds_training:
                now = max(free)
        now = max(now, ready.pop(step, 0.0))
        found[step] = now - begin
    return found
