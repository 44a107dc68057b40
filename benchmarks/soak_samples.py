"""Memory, descriptors, threads and children of a process at each step, and whether they have grown."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("memory, MiB", "descriptors", "threads", "children")
FEWEST = 60  # steps of a life whose thirds are compared
WARM_UP = 10  # steps after which a process has all it needs
# growth that is none, relative and absolute: the allocator's pools fill for a thousand steps, and the first root in the
# training thread loads LAPACK there
TOLERANCES = {"memory, MiB": (0.01, 4.0), "descriptors": (0.0, 2.0), "threads": (0.0, 2.0), "children": (0.0, 0.0)}
_PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


class Sampler:
    """Appends one line for each step, for the process that runs it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def take(self, step: int) -> None:
        threads = os.listdir("/proc/self/task")
        children = sum(len(Path(f"/proc/self/task/{thread}/children").read_text().split()) for thread in threads)
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
        line = [memory, len(os.listdir("/proc/self/fd")), len(threads), children]
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


@dataclass(frozen=True)
class Thirds:
    """Medians of the second and the last third of something."""

    second: float
    last: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Thirds:
        third = len(values) // 3
        return cls(statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :]))

    def has_grown(self, kind: str) -> bool:
        relative, absolute = TOLERANCES[kind]
        return self.last > self.second + max(relative * self.second, absolute)


@dataclass(frozen=True)
class Samples:
    """Of one rank of one life, in the order of its steps: one list for each of ``KINDS``."""

    life: int
    rank: int
    ranks: int
    values: dict[str, list[float]]

    @classmethod
    def read(cls, path: Path, ranks: int) -> Samples:
        _, life, rank = path.name.split("-")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return cls(int(life), int(rank), ranks, {kind: [row[i] for row in rows] for i, kind in enumerate(KINDS)})

    def __len__(self) -> int:
        return len(self.values[KINDS[0]])


def within_lives(samples: Sequence[Samples]) -> dict[str, tuple[Thirds, Samples]]:
    """Of lives that are long enough, the thirds that differ most."""
    found = {}
    for kind in KINDS:
        thirds = [(Thirds.of(one.values[kind]), one) for one in samples if len(one) >= FEWEST]
        if thirds:
            found[kind] = max(thirds, key=lambda entry: entry[0].last - entry[0].second)
    return found


def over_lives(samples: Sequence[Samples]) -> dict[int, dict[str, Thirds]]:
    """By number of ranks, thirds of the lives: medians of each of their processes once it has all it needs."""
    found = {}
    for ranks in sorted({one.ranks for one in samples}):
        lives = sorted(
            (one for one in samples if one.ranks == ranks and len(one) > WARM_UP), key=lambda one: (one.life, one.rank)
        )
        if len({one.life for one in lives}) >= 6:
            found[ranks] = {
                kind: Thirds.of([statistics.median(one.values[kind][WARM_UP:]) for one in lives]) for kind in KINDS
            }
    return found
