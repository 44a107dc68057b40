"""Seconds of chosen runs, in turns: every turn runs everybody once, with one seed, and is kept when it is whole."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import Contender
from run_store import FOLDER, Lines

SEEDS = 3  # a seed changes initialisation and order of the data
ClockedRunner = Callable[[Contender, float, int, int], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One contender at one learning rate and horizon."""

    contender: Contender
    lr: float
    horizon: int

    def is_of(self, run: Mapping[str, Any]) -> bool:
        return (run["options"], run["lr"], run["horizon"]) == (dict(self.contender.options), self.lr, self.horizon)


@dataclass(frozen=True)
class Timed:
    """One run of an entry.

    Attributes:
        ratio: the reference's seconds of the same turn over its own.
        where: machine and commit.
    """

    seed: int
    loss: float
    seconds: float
    ratio: float
    times: tuple[tuple[int, float], ...]
    where: str


class Clock:
    """Turns of one task. Args: reference: AdamW's shortest run to its own target, part of every turn."""

    def __init__(self, task: str, reference: Entry, threads: int, folder: Path = FOLDER) -> None:
        self.lines = Lines(folder / f"{task}_clock.jsonl")
        self.reference, self.threads = reference, threads

    def runs(self, entry: Entry) -> list[Timed]:
        """Of all turns in which it took part, with the options it has now."""
        found = []
        for turn in self.lines.read():
            mine, reference = (
                next((run for run in turn["runs"] if one.is_of(run)), None) for one in (entry, self.reference)
            )
            if turn["threads"] != self.threads or mine is None or reference is None:
                continue
            found.append(
                Timed(
                    seed=turn["seed"],
                    loss=float("inf") if mine["loss"] is None else mine["loss"],
                    seconds=mine["seconds"],
                    ratio=reference["seconds"] / mine["seconds"],
                    times=tuple((step, seconds) for step, seconds in mine["times"]),
                    where=turn.get("where", ""),
                )
            )
        return found

    def take(self, entries: Mapping[Entry, int], runner: ClockedRunner, where: Mapping[str, Any]) -> None:
        """Run turns until every entry has as many as asked for; what is there counts.

        Args:
            entries: turns of each.
        """
        while True:
            counts = {entry: len(self.runs(entry)) for entry in entries}
            lacking = [entry for entry, wanted in entries.items() if counts[entry] < wanted]
            if not lacking:
                return
            turn = min(counts[entry] for entry in lacking)
            chosen = [entry for entry in lacking if counts[entry] == turn and entry != self.reference]
            runs = []
            for entry in [self.reference, *chosen]:
                contender = entry.contender
                print(f"turn {turn + 1}: {contender.name}, {entry.horizon} steps", file=sys.stderr)
                result = runner(contender, entry.lr, entry.horizon, turn % SEEDS)
                runs.append(
                    {
                        "contender": contender.name,
                        "options": dict(contender.options),
                        "lr": entry.lr,
                        "horizon": entry.horizon,
                        **result,
                    }
                )
            self.lines.append({"seed": turn % SEEDS, "threads": self.threads, "runs": runs, **where})


def median_times(runs: list[Timed]) -> dict[int, float]:
    """Seconds after each step of a curve, the median over runs."""
    together: dict[int, list[float]] = {}
    for run in runs:
        for step, seconds in run.times:
            together.setdefault(step, []).append(seconds)
    return {step: statistics.median(values) for step, values in together.items()}
