"""Runs that are kept: a line of json each, so that a search that was killed goes on, and results can be read again."""

from __future__ import annotations

import fcntl
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "runs"


class Lines:
    """A file of json lines, to which several threads and processes append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """All that is whole: the last line of a process that was killed while it wrote is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        text = json.dumps(row, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # what was cut off stays a line of its own
                    file.write(b"\n")
            file.write(text.encode() + b"\n")


@dataclass(frozen=True, kw_only=True)
class Point:
    """What makes a run, beside the task. Attributes: horizon: steps, to which its schedule is fitted."""

    options: str
    lr: float
    horizon: int
    seed: int
    threads: int

    @classmethod
    def of(cls, options: Mapping[str, Any], lr: float, horizon: int, seed: int, threads: int) -> Point:
        """Args: options: the contender's; runs of other options, and so of other defaults, are other runs."""
        text = json.dumps(options, sort_keys=True)
        return cls(options=text, lr=lr, horizon=horizon, seed=seed, threads=threads)


class Store:
    """The runs of one task.

    Runs are told apart by the task, the contender's options, learning rate, horizon, seed and the number of threads, on
    which the order of sums depends. The contender's name is kept for readers alone.
    """

    def __init__(self, task: str, folder: Path = FOLDER) -> None:
        self.task, self.lines = task, Lines(folder / f"{task}.jsonl")
        self._lock = threading.Lock()
        self._found = {}
        for row in self.lines.read():
            if row["task"] == task:
                self._found[self._point(row)] = row

    def get(self, point: Point) -> dict[str, Any] | None:
        return self._found.get(point)

    def put(self, row: Mapping[str, Any]) -> None:
        """Args: row: options, lr, horizon, seed, threads, loss (None where it is not finite), curve, and what else."""
        kept = {"task": self.task, **row}
        self.lines.append(kept)
        with self._lock:
            self._found[self._point(kept)] = kept

    @staticmethod
    def _point(row: Mapping[str, Any]) -> Point:
        return Point.of(row["options"], row["lr"], row["horizon"], row["seed"], row["threads"])


def loss_of(row: Mapping[str, Any]) -> float:
    """The final loss, infinite where the run broke down."""
    return math.inf if row["loss"] is None else float(row["loss"])
