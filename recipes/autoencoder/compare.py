"""Eleven optimizers on the deep autoencoder: learning rates from grids of equal size, then three seeds each.

python recipes/autoencoder/compare.py [--tasks mnist fashion] [--dtypes float32 bfloat16] [--processes 2]

Adds a line for each run to comparison/runs.csv and goes on where it was stopped; compare_report.py makes the table and
the pictures. One thread for each process, about 30 seconds a run. A grid is extended while its best value is at an
edge; the bfloat16 grid begins around the best value of float32.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import logging
import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from contenders import CONTENDERS, LADDER, state_bytes
from data import fashion_mnist, mnist_5k
from model import Autoencoder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).parent / "comparison"
FASHION = Path("/usr/share/datasets/fashion-mnist")
STEPS, BATCH, WINDOW, EVERY = 400, 250, 20, 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRID, SEEDS = 4, 3


@dataclass(frozen=True)
class Run:
    """One run; losses are NaN where it diverged."""

    task: str
    dtype: str
    optimizer: str
    lr: float
    seed: int


@dataclass(frozen=True)
class Result(Run):
    """Args: train, validation: loss per picture after the last step; running: mean of the last WINDOW steps."""

    train: float
    validation: float
    running: float
    state_bytes: int


class Compared(Autoencoder):
    """The autoencoder under any optimizer and dtype; the loss is summed in float32 whatever the weights are."""

    def __init__(self, run: Run) -> None:
        super().__init__(run.lr, STEPS)
        self.make = CONTENDERS[run.optimizer].make
        self.to(DTYPES[run.dtype])
        self.losses: list[Tensor] = []

    def loss(self, images: Tensor) -> Tensor:
        logits = self(images.to(self.dtype)).float()
        return nn.functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.losses.append(loss.detach())
        if not torch.isfinite(loss):
            self.trainer.should_stop = True
        return loss

    def configure_optimizers(self) -> Any:
        return self.scheduled(self.make(self.parameters(), self.lr))

    @torch.no_grad()
    def mean_loss(self, images: Tensor) -> float:
        return float(np.mean([float(self.loss(part)) for part in images.split(1000)]))


def pictures(task: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Training and validation pictures: MNIST's 5,000 digits are cut 4,000 to 1,000."""
    if task == "fashion":
        return fashion_mnist(folder)
    digits = mnist_5k()
    return digits[:4000], digits[4000:]


def train(run: Run, training: Tensor, validation: Tensor) -> tuple[Result, list[float]]:
    """One run, and the mean loss of the last WINDOW steps at every EVERY-th step."""
    L.seed_everything(run.seed, verbose=False)
    model = Compared(run)
    trainer = L.Trainer(
        max_steps=STEPS,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(training), BATCH, shuffle=True, drop_last=True))
    losses = torch.stack(model.losses).double()
    means = [float(losses[max(0, end - WINDOW) : end].mean()) for end in range(EVERY, len(losses) + 1, EVERY)]
    # the training loss over as many pictures as there are for validation
    finals = [model.mean_loss(training[: len(validation)]), model.mean_loss(validation), means[-1]]
    if len(losses) < STEPS or not np.isfinite(finals).all():
        finals = [float("nan")] * 3
    return Result(**asdict(run), train=finals[0], validation=finals[1], running=finals[2],
                  state_bytes=state_bytes(trainer.optimizers[0])), means  # fmt: skip


def read_results() -> list[Result]:
    path = HERE / "runs.csv"
    if not path.exists():
        return []
    kinds = {field.name: {"str": str, "float": float, "int": int}[str(field.type)] for field in fields(Result)}
    with path.open(newline="") as file:
        return [Result(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def write(result: Result, means: list[float]) -> None:
    """Append to both files; processes take turns."""
    HERE.mkdir(exist_ok=True)
    with (HERE / "runs.csv").open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow([field.name for field in fields(Result)])
        values = asdict(result)
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values.values()])
        file.flush()
        with (HERE / "curves.csv").open("a", newline="") as curves:
            key = [result.task, result.dtype, result.optimizer, f"{result.lr:g}", result.seed]
            csv.writer(curves, lineterminator="\n").writerow([*key, *(f"{mean:.1f}" for mean in means)])


def best(results: list[Result]) -> Result | None:
    """The lowest mean loss at the end of training: what tuning may look at."""
    finite = [result for result in results if np.isfinite(result.running)]
    return min(finite, key=lambda result: result.running) if finite else None


def missing(task: str, dtype: str, optimizer: str, results: list[Result]) -> Iterator[Run]:
    """What is still to be run for one cell of the table, given what has been run."""
    mine = [r for r in results if (r.task, r.optimizer) == (task, optimizer)]
    tuned = [r for r in mine if r.dtype == dtype and r.seed == 0]
    done = {(r.lr, r.seed) for r in mine if r.dtype == dtype}
    grid = CONTENDERS[optimizer].grid(GRID)
    full = best([r for r in mine if r.dtype == "float32" and r.seed == 0])
    if dtype != "float32" and full is not None:
        middle = LADDER.index(full.lr)
        grid = LADDER[middle - GRID // 2 : middle - GRID // 2 + GRID]
    todo = [lr for lr in grid if (lr, 0) not in done]
    if not todo:
        found = best(tuned)
        if found is None:  # all diverged: lower
            todo = [LADDER[LADDER.index(min(r.lr for r in tuned)) - 1]]
        else:
            middle = LADDER.index(found.lr)
            todo = [lr for lr in LADDER[middle - 1 : middle + 2] if (lr, 0) not in done]
            if not todo:
                yield from (Run(task, dtype, optimizer, found.lr, s) for s in range(SEEDS) if (found.lr, s) not in done)
                return
    yield from (Run(task, dtype, optimizer, lr, 0) for lr in todo)


def complete(cell: tuple[str, str, str, Path]) -> None:
    """Everything that one cell of the table needs, in this process."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    task, dtype, optimizer, folder = cell
    images: tuple[Tensor, Tensor] | None = None
    while runs := list(missing(task, dtype, optimizer, read_results())):
        images = images or pictures(task, folder)
        for run in runs:
            result, means = train(run, *images)
            write(result, means)
            print(f"{task:8} {dtype:9} {optimizer:19} lr {run.lr:<6g} seed {run.seed}  train {result.train:.2f} "
                  f"validation {result.validation:.2f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=["mnist", "fashion"], default=["mnist", "fashion"])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--optimizers", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, default=FASHION, help="of Fashion-MNIST")
    arguments = parser.parse_args()
    cells = [(t, d, o, arguments.data_dir) for d in arguments.dtypes for o in arguments.optimizers
             for t in arguments.tasks]  # fmt: skip
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for _ in pool.imap_unordered(complete, cells, chunksize=1):
            pass


if __name__ == "__main__":
    main()
