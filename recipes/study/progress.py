"""How far the study is: one line that is written anew on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

TRUSTED = 60.0  # seconds: an estimate is believed until about as much has been seen of how wrong it is


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """
    Args:
        total: runs of the whole study. done: those that were there before.
        expected: processor seconds of what is to be run, estimated.
        jobs: processes.
        before: processor seconds of the runs that were there before.
        every: seconds between plain lines.
    """

    def __init__(
        self,
        total: int,
        done: int,
        expected: float,
        jobs: int,
        before: float = 0.0,
        stream: TextIO = sys.stdout,
        every: float = 10.0,
    ) -> None:
        self.total, self.done, self.expected, self.jobs = total, done, expected, jobs
        self.before, self.stream, self.every = before, stream, every
        self.terminal = stream.isatty()
        self.used = self.estimated = 0.0
        self.shown = -every

    def left(self) -> float:
        """Seconds to the end: what is estimated to be left, times how the estimate has been wrong so far."""
        wrong = (self.used + TRUSTED) / (self.estimated + TRUSTED)
        return max(0.0, self.expected - self.estimated) * wrong / self.jobs

    def add(self, seconds: float, estimated: float, text: str) -> None:
        """A run has ended.

        Args:
            seconds, estimated: processor time it took and was expected to take.
            text: about its cell.
        """
        self.done += 1
        self.used, self.estimated = self.used + seconds, self.estimated + estimated
        used = f"{(self.before + self.used) / 3600:.3f} core-hours used"
        line = f"{self.done}/{self.total} runs, {used}, about {duration(self.left())} left; {text}"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r\033[K" + line[:width])
        elif time.monotonic() - self.shown >= self.every or self.done == self.total:
            self.stream.write(line + "\n")
            self.shown = time.monotonic()
        self.stream.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.stream.write(("\r\033[K" if self.terminal else "") + text + "\n")
        self.stream.flush()

    def end(self) -> None:
        if self.terminal:
            self.stream.write("\n")
            self.stream.flush()
