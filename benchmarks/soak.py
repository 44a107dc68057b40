"""Trains for minutes while workers and ranks are killed at random, and compares with a run that nobody disturbed.

python benchmarks/soak.py --minutes 10 --seed 0 [--engine fsdp2] [--fixed-ranks] [--output FILE]

A small model in float64 and Shampoo with worker processes and refreshes in flight, in 1 to 3 gloo processes. Root
workers are killed, steps skipped, batches have a NaN, checkpoints are written (half of them in the background),
training processes are killed, also in a save, and training goes on from the newest checkpoint at another number of
processes. At the end the steps that the last checkpoint stands for are trained again by one process that nobody
disturbs: the same parameters to 1e-9 of their movement. With `--fixed-ranks` there are always 2, and the parameters are
the same bit for bit. Processes must not grow, nor leave anything behind. The status is 1 where anything is violated.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import machine, report
from soak_journal import Follower, Line
from soak_plan import Life, draw_life, last_life
from soak_task import ENGINES
from soak_verdict import Verdict
from soak_worker import BREAKS, GROUP_TIMEOUT, PEER_HAS_GONE
from soak_world import World, kill_process, left_processes, left_shared_memory, shared_memory

SILENCE = 120.0  # seconds without a step after which a life hangs
KILLED = -9
FIXED_RANKS = 2


class Soak:
    """Runs lives one after the other, and notes what happened."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.ranks = FIXED_RANKS if options.fixed_ranks else None
        self.begin, self.seconds = time.monotonic(), 0.0
        self.journal = Follower(folder / "journal.jsonl")
        self.events: Counter[str] = Counter()
        self.lives: list[Life] = []
        self.violations: list[str] = []
        self.shared_memory = shared_memory()
        self.save_seconds = 0.1  # of late, in the step

    def say(self, text: str, event: str | None = None) -> None:
        """One line of the log; counted where it is an event."""
        if event is not None:
            self.events[event] += 1
        print(f"{time.monotonic() - self.begin:7.1f} s  {text}", flush=True)

    def violate(self, text: str) -> None:
        self.violations.append(text)
        self.say(f"VIOLATION: {text}")

    def run(self) -> None:
        """Lives until the time or the steps are over, and a last one."""
        options = self.options
        while self._reached() < options.steps and time.monotonic() - self.begin < 60 * options.minutes:
            self._live(draw_life(options.seed, len(self.lives), self.ranks, options.longest))
            if self.violations and self.violations[-1].startswith("life"):  # it would only be repeated
                break
        rest = max(0, options.steps - self._reached()) if options.steps < sys.maxsize else 0
        self._live(last_life(options.seed, len(self.lives), self.ranks, rest))
        self.seconds = time.monotonic() - self.begin
        for path in left_shared_memory(self.shared_memory):
            self.violate(f"{path} is left in shared memory")
        for path in sorted((self.folder / "checkpoints").glob("*.*")):
            self.violate(f"{path.name} is left among the checkpoints although later saves had its name")

    def _reached(self) -> int:
        """Steps that the newest completed checkpoint stands for."""
        return max((line["saved"] for line in self.journal.lines if "saved" in line), default=0)

    def _live(self, life: Life) -> None:
        options, is_clean = self.options, life.ending == "clean"
        self.lives.append(life)
        self.say(
            f"life {life.number}: {life.ranks} ranks, {life.steps} steps, then {life.ending}; "
            f"max_restarts={life.max_restarts}",
            f"life at {life.ranks} ranks",
        )
        completed = self._reached()
        workers = {"kind": "process", "count": life.workers, "max_restarts": life.max_restarts, "deadline": 7}
        arguments = [
            *("--engine", options.engine, "--seed", str(options.seed), "--life", str(life.number)),
            *("--steps", str(life.steps), "--workers", json.dumps(workers)),
            *([] if is_clean else ["--endless"]),
            *(["--breaks", *options.breaks] if options.breaks else []),
        ]
        world = World(self.folder, str(life.number), life.ranks, arguments)
        victims = _Course(self, world, life, completed).run()
        late = world.wait(2 * GROUP_TIMEOUT if victims else 10.0)
        self._take_news()
        for rank in late:
            self.violate(f"life {life.number}: rank {rank} has not ended by itself: {world.end_of_log(rank)}")
        for rank, status in enumerate(world.statuses):
            expected = {KILLED} if rank in victims else {PEER_HAS_GONE} if victims else {0}
            if status not in expected and rank not in late and not (is_clean and status == PEER_HAS_GONE):
                self.violate(f"life {life.number}: rank {rank} ended with {status}: {world.end_of_log(rank)}")
        for process in left_processes(self.folder):
            self.violate(f"process {process} goes on after life {life.number}")
        unfinished = sorted(path.name for path in (self.folder / "checkpoints").glob("*.*"))
        if unfinished and victims:
            self.say(f"left unfinished: {', '.join(unfinished)}", "save cut off by a kill")

    def _take_news(self) -> list[Line]:
        news = self.journal.news()
        for line in news:
            if line.get("did", "accepted") != "accepted":
                self.say(f"step {line['step']}: {line['did']}", f"step: {line['did']}")
            elif "saving" in line:
                where = "in the background" if line["background"] else "in the step"
                self.say(f"step {line['saving']}: checkpoint, {where}", f"checkpoint {where}")
        return news


class _Course:
    """What is done to one life while it lasts."""

    def __init__(self, soak: Soak, world: World, life: Life, completed: int) -> None:
        self.soak, self.world, self.life, self.completed = soak, world, life, completed
        self.draw = random.Random(f"course {soak.options.seed} {life.number}")
        self.kills = list(life.kills)
        self.first: int | None = None
        self.done = 0
        self.killed: set[int] = set()
        self.saving: Line | None = None  # the checkpoint that has just been begun, and when
        self.saving_since = 0.0

    def run(self) -> list[int]:
        """Until the life ends or has been ended; the ranks that were killed."""
        life, ending = self.life, self.life.ending
        heard = time.monotonic()
        moment = heard + self.draw.uniform(0.5, 8.0) if ending == "killed while starting" else float("inf")
        while all(status is None for status in self.world.statuses):
            news = self.soak._take_news()
            now = time.monotonic()
            heard = now if news else heard
            for line in news:
                self._hear(line, now)
            if now - heard > SILENCE:
                self.soak.violate(f"life {life.number}: nothing happened for {SILENCE:.0f} s")
                return self._kill(list(range(life.ranks)))
            while self.kills and self.first is not None and self.done >= self.kills[0]:
                self.kills.pop(0)
                self._kill_workers()
            is_over = self.first is not None and self.done >= life.steps
            if now >= moment or (is_over and ending in ("one killed", "all killed")):
                return self._kill(self._victims())
            if is_over and ending.endswith("in a save") and any("saving" in line for line in news):
                self._wait_for_a_save()
                return self._kill(self._victims())
            time.sleep(0.002)
        return []

    def _wait_for_a_save(self) -> None:
        """Until some way into the save that has just been announced."""
        limit = time.monotonic() + 1.0
        while time.monotonic() < limit and not [*(self.soak.folder / "checkpoints").glob("*.unfinished")]:
            time.sleep(0.001)
        time.sleep(self.draw.uniform(0.0, 0.7 * self.soak.save_seconds))

    def _hear(self, line: Line, now: float) -> None:
        if "start" in line:
            self.first = line["start"]
            self.soak.say(f"from step {self.first}, {line['source'] or 'the beginning'}")
            if self.first < self.completed:
                self.soak.violate(
                    f"life {self.life.number} begins at step {self.first}: the checkpoint of step {self.completed} "
                    "was complete"
                )
        elif "step" in line:
            self.done = line["step"] + 1 - (self.first or 0)
        elif "saving" in line:
            self.saving, self.saving_since = line, now
        elif "saved" in line and self.saving is not None and not self.saving["background"]:
            self.soak.save_seconds += 0.2 * (min(now - self.saving_since, 1.0) - self.soak.save_seconds)

    def _victims(self) -> list[int]:
        ranks = list(range(self.life.ranks))
        return ranks if self.life.ending.startswith("all") else [self.draw.choice(ranks)]

    def _kill(self, ranks: list[int]) -> list[int]:
        alive = [rank for rank in ranks if self.world.statuses[rank] is None]
        self.world.kill(alive)
        self.soak.say(f"{self.life.ending}: ranks {alive} after {self.done} steps", f"training: {self.life.ending}")
        return alive

    def _kill_workers(self) -> None:
        rank = self.draw.randrange(self.life.ranks)
        workers = [pid for pid in self.world.root_workers(rank) if pid not in self.killed]
        for pid in workers if self.draw.random() < 0.5 else workers[:1]:
            if kill_process(pid):
                self.killed.add(pid)
                self.soak.say(f"step {self.done}: root worker {pid} of rank {rank} killed", "root worker killed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="only the last life begins after them")
    parser.add_argument("--steps", type=int, default=sys.maxsize, help="of the run, if they are reached first")
    parser.add_argument("--longest", type=int, default=480, help="steps of a long life")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, default="ddp")
    parser.add_argument("--fixed-ranks", action="store_true", help="always 2 processes, and equal bits")
    parser.add_argument("--breaks", nargs="*", choices=BREAKS, default=[], help="plant these, to see them found")
    parser.add_argument("--folder", type=Path, help="keep journal, logs and checkpoints there")
    parser.add_argument("--output", type=Path, help="also write the table here")
    return parser.parse_args()


def main() -> int:
    options = parse()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="soak"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        sys.exit(f"--folder {folder}: it is not empty, and a soak begins at step 0")
    where = machine()
    soak = Soak(options, folder)
    soak.run()
    verdict = Verdict(soak)
    verdict.reach()
    report(verdict.lines(where), options.output)
    if options.folder is None and not soak.violations:
        shutil.rmtree(folder)
    elif soak.violations:
        print(f"journal, logs and checkpoints: {folder}")
    return int(bool(soak.violations))


if __name__ == "__main__":
    sys.exit(main())
