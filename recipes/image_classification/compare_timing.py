"""Milliseconds of a training step of every contender, in turns, on one thread: about four minutes on a quiet machine.

python recipes/image_classification/compare_timing.py [--contenders "SGD, BatchNorm, 128" ...]

The runs of compare.py share the machine with whatever else runs there; the seconds of the report are steps times these.
Everything is computed in this process, and its own processor time is what counts: waiting for other work does not.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from compare import HERE
from contenders import CONTENDERS
from data import read, split
from model import ResNet20
from optimizers import TAKEN_OVER, make_optimizer, second_order_options
from settings import Settings
from torch import nn

from lightning_soo.optim.takeover import take_over

TURNS = 3
PARTS = 20  # at least, in a turn
FIRST_ORDER = ("sgd", "adamw")


class Runner:
    """One contender's training steps, whole intervals of its inversions at a time."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        # steps are timed, not learning: small ones stay finite
        self.settings = replace(settings, lr=settings.lr * 1e-3)
        self.network = ResNet20(1, 10, settings.width, settings.normalization)
        self.network.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.network, self.settings, "inline")
        if settings.optimizer in TAKEN_OVER:
            take_over(self.optimizer, settings.optimizer, second_order_options(settings, "inline"), self.network)
        interval = 1 if settings.optimizer in FIRST_ORDER else settings.precondition_frequency
        # whole intervals, so that each turn has as many inversions or roots as its steps have in a long run
        self.steps = -(-PARTS // (interval * settings.accumulate)) * interval

    def turn(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        size = self.settings.batch_size // self.settings.accumulate
        start, position = time.process_time(), 0
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            for _ in range(self.settings.accumulate):
                rows = slice(position, position + size)
                position = (position + size) % (len(images) - size)
                output = self.network(images[rows])
                (nn.functional.cross_entropy(output, labels[rows]) / self.settings.accumulate).backward()
            self.optimizer.step()
        return 1000 * (time.process_time() - start) / self.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    chosen = parser.parse_args().contenders
    torch.set_num_threads(1)
    training, _ = split(read(None, 32)[0], 4096, 100)
    images = training.images.float().permute(0, 3, 1, 2)
    images = ((images - images.mean()) / images.std()).contiguous(memory_format=torch.channels_last)
    runners = {name: Runner(CONTENDERS[name].base) for name in chosen}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(TURNS + 1):
        for name, runner in runners.items():
            spent = runner.turn(images, training.labels)
            print(f"turn {turn}: {name}: {spent:.0f} ms", flush=True)
            if turn:  # the first one warms up
                times[name].append(spent)
    write({name: [median(spent), min(spent), max(spent)] for name, spent in times.items()}, HERE / "timing.csv")


def write(measured: dict[str, list[float]], path: Path) -> None:
    """In place of what the file has of these contenders; others stay."""
    lines: dict[str, list[str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            lines = {line["contender"]: list(line.values())[1:] for line in csv.DictReader(file)}
    for name, values in measured.items():
        lines[name] = [f"{value:.4g}" for value in values]
        print(f"{name}: {values[0]:.0f} ms a step [{values[1]:.0f}, {values[2]:.0f}]")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["contender", "milliseconds", "smallest", "largest"])
        writer.writerows([name, *lines[name]] for name in CONTENDERS if name in lines)


if __name__ == "__main__":
    main()
