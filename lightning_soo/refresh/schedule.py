"""When roots are refreshed and when they are swapped in: a pure function of the step and of block names and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_soo.placement.assignment import assign
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.costs import refresh_milliseconds


@dataclass(frozen=True, kw_only=True)
class RefreshSchedule:
    """The clock of refreshes; steps count from 1 and skipped steps do not count.

    Attributes:
        frequency: steps between two refreshes of a block.
        delay: a refresh started at step ``t`` is used from step ``t + delay`` on; 0 means at once.
        start: step of every block's first refresh.
        gather: roots change hands only at multiples of this; 1 means as soon as the delay is over.
        statistics: steps between two updates of the statistics.
        offsets: block key -> position in the interval; all 0 without staggering.
    """

    frequency: int
    delay: int
    start: int
    gather: int = 1
    statistics: int = 1
    offsets: dict[str, int]

    def observes(self, step: int) -> bool:
        """Whether statistics are updated: at step 1, then at every multiple of ``statistics``."""
        return step == 1 or step % self.statistics == 0

    def refreshes(self, key: str, step: int) -> bool:
        """Whether a refresh of this block starts.

        At ``start``, then wherever ``(step - offset)`` is a multiple of the frequency. A staggered block whose turn
        comes less than half an interval after ``start`` waits for the next one: its roots are fresh.
        """
        if step <= self.start:
            return step == self.start
        offset = self.offsets.get(key, 0)
        return (step - offset) % self.frequency == 0 and (offset == 0 or 2 * (step - self.start) >= self.frequency)

    def swap_step(self, step: int) -> int:
        """First step that uses the roots of a refresh started at ``step``."""
        ready = step + self.delay
        return -(-ready // self.gather) * self.gather


def stagger_offsets(blocks: Sequence[Block], frequency: int) -> dict[str, int]:
    """Spread refreshes over the interval so that every step carries about the same work."""
    ordered = sorted(blocks, key=lambda block: block.key)
    slots = assign([refresh_milliseconds(block) for block in ordered], frequency)
    return {block.key: slot for block, slot in zip(ordered, slots, strict=True)}
