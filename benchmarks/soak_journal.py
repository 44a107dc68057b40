"""What happened at each step, on disk before the next one begins; and which of them a checkpoint stands for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soak_plan import ACCEPTED

Line = dict[str, Any]


@dataclass
class Segment:
    """Consecutive steps of one life, ``[first, stop)``; all but ``left_out`` were accepted."""

    life: int
    ranks: int
    first: int
    stop: int
    left_out: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> list[int]:
        out = set(self.left_out)
        return [step for step in range(self.first, self.stop) if step not in out]

    def plain(self) -> dict[str, Any]:
        """For a checkpoint's ``extra``."""
        return asdict(self)


class Journal:
    """Appends lines, each on disk when ``write`` returns."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def write(self, **line: Any) -> None:
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")
        os.fsync(self._descriptor)


class Follower:
    """Reads what has been appended since it last looked."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.lines: list[Line] = []

    def news(self) -> list[Line]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        found = [json.loads(line) for line in whole.splitlines()]
        self.lines += found
        return found


def contradictions(segments: Sequence[Segment], lines: Sequence[Line]) -> list[str]:
    """Where a checkpoint's list of accepted steps and the journal on disk disagree."""
    noted = {(line["life"], line["step"]): line["did"] for line in lines if "did" in line}
    found, position = [], 0
    for segment in segments:
        if segment.first != position:
            found.append(f"life {segment.life} begins at step {segment.first}, the one before ended at {position}")
        position = segment.stop
        out = set(segment.left_out)
        for step in range(segment.first, segment.stop):
            did = noted.get((segment.life, step), "nothing")
            if (did == ACCEPTED) == (step in out):
                listed = "left out" if step in out else "accepted"
                found.append(f"step {step} of life {segment.life} is {listed} in the checkpoint, {did} in the journal")
    return found
