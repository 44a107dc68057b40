"""Milliseconds of a training step of every contender, in turns, on one thread of a quiet machine.

python recipes/image_classification/compare_timing.py

The runs of compare.py share the machine with whatever else runs there; the seconds of the report are steps times these.
"""

from __future__ import annotations

import csv
import time
from dataclasses import replace
from statistics import median

import torch
from compare import HERE
from contenders import CONTENDERS
from data import read, split
from model import ResNet20
from settings import Settings
from torch import nn
from train import make_optimizer

TURNS = 3


class Runner:
    """One contender's training steps, whole intervals of its inversions at a time."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(0)
        # steps are timed, not learning: small ones stay finite
        self.settings = replace(settings, lr=settings.lr * 1e-3)
        self.network = ResNet20(1, 10, settings.width, settings.normalization)
        self.network.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.network, self.settings)
        interval = settings.precondition_frequency if settings.optimizer == "kfac" else 1
        # at least half a minute's worth of parts, whole intervals
        parts = 4 * interval * settings.accumulate
        self.steps = (parts if parts >= 40 else 40 // parts * parts) // settings.accumulate

    def turn(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        size = self.settings.batch_size // self.settings.accumulate
        start, position = time.perf_counter(), 0
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            for _ in range(self.settings.accumulate):
                rows = slice(position, position + size)
                position = (position + size) % (len(images) - size)
                output = self.network(images[rows])
                (nn.functional.cross_entropy(output, labels[rows]) / self.settings.accumulate).backward()
            self.optimizer.step()
        return 1000 * (time.perf_counter() - start) / self.steps


def main() -> None:
    torch.set_num_threads(1)
    training, _ = split(read(None, 32)[0], 4096, 100)
    images = training.images.float().permute(0, 3, 1, 2)
    images = ((images - images.mean()) / images.std()).contiguous(memory_format=torch.channels_last)
    runners = {name: Runner(contender.base) for name, contender in CONTENDERS.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(TURNS + 1):
        for name, runner in runners.items():
            spent = runner.turn(images, training.labels)
            if turn:  # the first one warms up
                times[name].append(spent)
    with (HERE / "timing.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["contender", "milliseconds", "smallest", "largest"])
        for name, spent in times.items():
            writer.writerow([name, *(f"{value:.4g}" for value in (median(spent), min(spent), max(spent)))])
            print(f"{name}: {median(spent):.0f} ms a step [{min(spent):.0f}, {max(spent):.0f}]")


if __name__ == "__main__":
    main()
