"""SGD, Shampoo and K-FAC to a target accuracy: grids at one budget, then every budget with what was best.

python recipes/image_classification/compare.py [--contenders "SGD, BatchNorm, 128" ...] [--budgets 4 12]

Each run is a process with one thread. It adds a line to comparison/runs.csv and its validations to
comparison/curves.csv; a run that stands there is not repeated. report.py makes the table and the picture.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import multiprocessing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from contenders import BUDGETS, CONTENDERS, TUNING_EPOCHS, Contender
from settings import Settings
from train import Row, fit

HERE = Path(__file__).parent / "comparison"
FIELDS = ("settings", "steps", "seconds", "train_loss", "validation_accuracy", "test_accuracy")


@dataclass(frozen=True)
class Run:
    """A finished run. Args: rows: one for each validation."""

    settings: Settings
    rows: list[Row]
    test_accuracy: float

    @property
    def accuracy(self) -> float:
        """At the end, on validation examples: what tuning may look at; 0 where the run diverged."""
        last = self.rows[-1]
        return last.validation_accuracy if math.isfinite(last.train_loss) else 0.0

    def reaches(self, target: float) -> Row | None:
        return next((row for row in self.rows if row.validation_accuracy >= target), None)


def read_runs() -> dict[Settings, Run]:
    if not (HERE / "runs.csv").exists():
        return {}
    rows: dict[str, list[Row]] = {}
    with (HERE / "curves.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            key = line.pop("settings")
            values = {name: float(value) for name, value in line.items()}
            rows.setdefault(key, []).append(Row(int(values.pop("step")), **values))  # type: ignore[arg-type]
    with (HERE / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    runs = [Run(Settings.parse(x["settings"]), rows[x["settings"]], float(x["test_accuracy"])) for x in lines]
    return {run.settings: run for run in runs}


def append(path: Path, header: Sequence[str], lines: list[list[object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(header)
        writer.writerows([f"{x:.5g}" if isinstance(x, float) else x for x in line] for line in lines)


def work(settings: Settings, data_dir: Path | None) -> tuple[list[Row], float]:
    """One run, in its own process."""
    import torch
    from data import read
    from scaling import Scaling

    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec).*")
    result = fit(settings, read(data_dir, 32), progress=False, scaling=Scaling(workers="inline"))  # all on the clock
    return result.rows, result.test_accuracy


def run(settings: Settings, data_dir: Path | None) -> Run:
    """The run, from the csv files if it stands there."""
    known, settings = read_runs(), Settings.parse(str(settings))  # floats as the files have them
    if settings in known:
        return known[settings]
    print(f"{settings} ...", end=" ", flush=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rows, accuracy = pool.apply(work, (settings, data_dir))
    last, key = rows[-1], str(settings)
    values = [[key, r.step, r.epoch, r.seconds, r.train_loss, r.validation_accuracy] for r in rows]
    append(HERE / "curves.csv", ["settings", *Row.__dataclass_fields__], values)
    line = [key, last.step, last.seconds, last.train_loss, last.validation_accuracy, accuracy]
    append(HERE / "runs.csv", FIELDS, [line])
    print(f"{last.seconds:.0f} s, loss {last.train_loss:.3f}, validation {last.validation_accuracy:.4f}", flush=True)
    return Run(settings, rows, accuracy)


def tune(contender: Contender, data_dir: Path | None) -> Settings:
    """The best of the grid of learning rates, of the second setting's at the best of them, and of what else was run."""
    base = replace(contender.base, epochs=TUNING_EPOCHS)
    tried = [run(replace(base, lr=lr), data_dir) for lr in contender.lrs]
    while True:
        best, lrs = max(tried, key=lambda r: r.accuracy), [r.settings.lr for r in tried]
        if best.accuracy and min(lrs) < best.settings.lr < max(lrs):
            break
        lr = min(lrs) / 2 if best.settings.lr == min(lrs) or not best.accuracy else max(lrs) * 2
        tried.append(run(replace(base, lr=lr), data_dir))
    for value in contender.values:
        run(replace(best.settings, **{contender.second: value}), data_dir)
    tuned = [r for r in read_runs().values() if r.settings.epochs == TUNING_EPOCHS and r.settings.seed == 0]
    return max((r for r in tuned if contender.owns(r.settings)), key=lambda r: r.accuracy).settings


def complete(
    contender: Contender, budgets: Sequence[int], factors: Sequence[float], seeds: Sequence[int], data_dir: Path | None
) -> None:
    best = tune(contender, data_dir)
    for epochs in budgets:
        for factor in factors:
            for seed in seeds:
                run(replace(best, epochs=epochs, lr=best.lr * factor, seed=seed), data_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--budgets", nargs="*", type=int, default=list(BUDGETS), help="epochs; none: tuning alone")
    parser.add_argument("--factors", nargs="+", type=float, default=[1.0], help="of the best learning rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    for name in arguments.contenders:
        print(name, flush=True)
        complete(CONTENDERS[name], arguments.budgets, arguments.factors, arguments.seeds, arguments.data_dir)


if __name__ == "__main__":
    main()
