"""AdamW against second order on one recipe: equal grids of learning rates, then budgets, then milliseconds in turns.

A recipe's compare.py describes a Comparison and calls ``main``:

python recipes/NAME/compare.py run       # every run that is missing, each a process with one thread: comparison/*.csv
python recipes/NAME/compare.py timing    # milliseconds of a step, contenders in turns, on a quiet machine
python recipes/NAME/compare.py report    # comparison/README.md and comparison/comparison.png

The same train.py is run for all: AdamW as it stands, the others through ``lightning_soo.launch`` with a yaml file.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median

TURNS = 3


@dataclass(frozen=True)
class Contender:
    """Args: config: yaml beside compare.py; None for the optimizer of the script. lrs: the grid, in order."""

    name: str
    config: str | None
    lrs: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """What makes a run. Args: steps: to which the schedule is fitted."""

    contender: str
    lr: float
    steps: int
    seed: int = 0


@dataclass(frozen=True)
class Row:
    step: int
    seconds: float
    train_loss: float
    validation_loss: float


@dataclass(frozen=True)
class Comparison:
    """
    Args:
        folder: of the recipe, with train.py.
        title, introduction: of the report.
        contenders: the first sets the target; grids are of equal size.
        steps: the budget at which learning rates are tuned.
        budgets: others, at the best learning rate of each contender.
        arguments: of train.py for all runs.
        seeds: at the tuned budget.
        timed_steps: of one turn; a multiple of every refresh interval, and of a tenth of it.
        unit: of the loss.
    """

    folder: Path
    title: str
    introduction: str
    contenders: tuple[Contender, ...]
    steps: int
    budgets: tuple[int, ...]
    arguments: tuple[str, ...] = ()
    seeds: int = 2
    timed_steps: int = 60
    unit: str = "loss"
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {len(contender.lrs) for contender in self.contenders}
        if len(sizes) != 1:
            raise ValueError(f"grids must be of equal size, not {sorted(sizes)}")

    @property
    def results(self) -> Path:
        return self.folder / "comparison"

    def main(self, *parents: argparse.ArgumentParser) -> None:
        """The command line of a recipe's compare.py.

        Args:
            parents: options of the recipe's own, which it has read itself.
        """
        parser = argparse.ArgumentParser(
            formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__, parents=parents
        )
        parser.add_argument("what", choices=["run", "timing", "report"])
        parser.add_argument("--processes", type=int, default=1, help="contenders that run at the same time")
        given = parser.parse_args()
        if given.what == "run":
            with ThreadPoolExecutor(given.processes) as pool:
                list(pool.map(self.complete, self.contenders))
        elif given.what == "timing":
            self.time()
        else:
            from comparison_report import report

            report(self)

    def read(self) -> dict[Run, list[Row]]:
        """Every run that stands in comparison/runs.csv."""
        path, found = self.results / "runs.csv", dict[Run, list[Row]]()
        if not path.exists():
            return found
        kinds = {f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in (*fields(Run), *fields(Row))}
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                values = {name: kinds[name](value) for name, value in line.items()}
                run = Run(**{f.name: values[f.name] for f in fields(Run)})
                found.setdefault(run, []).append(Row(**{f.name: values[f.name] for f in fields(Row)}))
        return found

    def read_timing(self) -> dict[str, float]:
        """Milliseconds of a step by contender."""
        with (self.results / "timing.csv").open(newline="") as file:
            return {line["contender"]: float(line["milliseconds"]) for line in csv.DictReader(file)}

    def tuned(self, contender: Contender, runs: dict[Run, list[Row]]) -> Run:
        """The lowest validation loss at the tuning budget, seed 0."""
        mine = [r for r in runs if (r.contender, r.steps, r.seed) == (contender.name, self.steps, 0)]
        return min(mine, key=lambda run: final(runs[run]))

    def complete(self, contender: Contender) -> None:
        """Run what is missing of one contender: the grid, extended while its best value is at an edge, and the rest."""
        for lr in contender.lrs:
            self.run(contender, Run(contender.name, lr, self.steps))
        while True:
            runs = self.read()
            best = self.tuned(contender, runs).lr
            tried = sorted(r.lr for r in runs if (r.contender, r.steps, r.seed) == (contender.name, self.steps, 0))
            ratio = contender.lrs[1] / contender.lrs[0]
            if tried[0] < best < tried[-1]:
                break
            beyond = best * ratio if best == tried[-1] else best / ratio
            self.run(contender, Run(contender.name, float(f"{beyond:.2g}"), self.steps))
        for steps in self.budgets:
            self.run(contender, Run(contender.name, best, steps))
        for seed in range(1, self.seeds):
            self.run(contender, Run(contender.name, best, self.steps, seed))

    def run(self, contender: Contender, run: Run) -> None:
        """One run, unless it stands in the csv file."""
        with self._lock:
            if run in self.read():
                return
        rows = self.start(contender, run)
        with self._lock:
            self.results.mkdir(exist_ok=True)
            with (self.results / "runs.csv").open("a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow([f.name for f in (*fields(Run), *fields(Row))])
                for row in rows:
                    values = [*vars(run).values(), *vars(row).values()]
                    writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
        last = rows[-1]
        print(f"{run}: validation {last.validation_loss:.4f}, {last.seconds:.0f} s", flush=True)

    def start(self, contender: Contender, run: Run, *arguments: str) -> list[Row]:
        """Run train.py in a process of its own and read its record.

        Raises:
            RuntimeError: it failed; ends with its own error output.
        """
        launch = ["-m", "lightning_soo.launch"] if contender.config is not None else []
        environment = {name: value for name, value in os.environ.items() if name != "SOO_CONFIG"}
        environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
        if contender.config is not None:
            environment["SOO_CONFIG"] = str(self.folder / contender.config)
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "record.csv"
            command = [
                *(sys.executable, *launch, str(self.folder / "train.py"), *self.arguments),
                *("--lr", f"{run.lr:g}", "--steps", str(run.steps), "--seed", str(run.seed)),
                *("--record", str(record), *arguments),
            ]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
            with record.open(newline="") as file:
                lines = list(csv.DictReader(file))
        return [
            Row(int(x["step"]), float(x["seconds"]), float(x["train_loss"]), float(x["validation_loss"])) for x in lines
        ]

    def time(self) -> None:
        """Contenders in turns; of each turn the steps after the first third, in which everything warms up."""
        runs, times = self.read(), {contender.name: list[float]() for contender in self.contenders}
        third = self.timed_steps // 3
        for _ in range(TURNS):
            for contender in self.contenders:
                run = Run(contender.name, self.tuned(contender, runs).lr, self.timed_steps)
                rows = self.start(contender, run, "--evaluate-every", str(third))
                spent = 1e3 * (rows[-1].seconds - rows[0].seconds) / (rows[-1].step - rows[0].step)
                times[contender.name].append(spent)
                print(f"{contender.name}: {spent:.1f} ms a step", flush=True)
            self._write_timing(times)  # after every turn: one that is stopped leaves whole turns

    def _write_timing(self, times: dict[str, list[float]]) -> None:
        with (self.results / "timing.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["contender", "milliseconds", "smallest", "largest"])
            for name, spent_of_all in times.items():
                values = (median(spent_of_all), min(spent_of_all), max(spent_of_all))
                writer.writerow([name, *(f"{value:.4g}" for value in values)])


def final(rows: list[Row]) -> float:
    """Validation loss at the end; infinite where the run diverged."""
    last = rows[-1].validation_loss
    return last if math.isfinite(last) and math.isfinite(rows[-1].train_loss) else math.inf
