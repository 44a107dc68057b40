"""Seconds until AdamW's final loss, with a schedule fitted to each optimizer's own budget.

python benchmarks/time_to_target.py [--contenders AdamW ours] [--output FILE]

With a decaying schedule the loss falls at the end, so stopping a long run early is unfair to the slower method and
letting it run on is unfair to the faster one. Every optimizer therefore gets a grid of horizons and of learning rates
(extended while the best is at an edge); its time is that of the shortest horizon whose run ends at or below the
target: the loss over all digits where AdamW's best run of 400 steps ends. The best points are then repeated in turns
over three seeds of the order of the digits. Roots, worker start-up and refreshes are on the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from contenders import Contender, contenders
from measure import machine, report
from tasks import Task, autoencoder, digits

from lightning_soo import Shampoo

WARM_UP = 20
LONGEST = 400
HORIZONS = (32, 40, 48, 64, 96, 160, 256, LONGEST)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
START = (3, 6)  # the part of the ladder that everyone gets first: 3e-4, 1e-3, 2e-3


@dataclass(frozen=True)
class Outcome:
    loss: float
    seconds: float


def train(task: Task, images: torch.Tensor, contender: Contender, lr: float, horizon: int, seed: int = 0) -> Outcome:
    """One run; the loss is over all digits, after the clock has stopped."""
    net = task.model()
    batches = [task.batch(1000 * seed + step) for step in range(horizon)]

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * max(0.0, min(1.0, (horizon - step) / (horizon - WARM_UP)))

    start = time.perf_counter()
    optimizer = contender.make(net, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for batch in batches:
        task.loss(net, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if isinstance(optimizer, Shampoo):
        optimizer.close()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        return Outcome(float(task.loss(net, images)), seconds)


class Search:
    """The grid of one contender; every run once."""

    def __init__(self, task: Task, images: torch.Tensor, contender: Contender) -> None:
        self.task, self.images, self.contender = task, images, contender
        self.runs: dict[tuple[float, int], Outcome] = {}
        self.centre: int | None = None  # place of the longest horizon's best learning rate in the ladder

    def run(self, lr: float, horizon: int) -> Outcome:
        if (lr, horizon) not in self.runs:
            outcome = self.runs[lr, horizon] = train(self.task, self.images, self.contender, lr, horizon)
            print(f"  {self.contender.name}: lr {lr:g}, {horizon} steps: {outcome.loss:.1f}", file=sys.stderr)
        return self.runs[lr, horizon]

    def best_lr(self, horizon: int) -> float:
        """The best of the starting grid, extended while it is at an edge; first the longest horizon's neighbours."""
        start = LADDER[slice(*START)]
        if self.centre is not None:
            start = LADDER[max(0, self.centre - 1) : self.centre + 2]
        tried = list(start)
        while True:
            best = min(tried, key=lambda lr: self.run(lr, horizon).loss)
            index = LADDER.index(best)
            more = [lr for lr in LADDER[max(0, index - 1) : index + 2] if lr not in tried]
            if not more:
                if horizon == LONGEST:
                    self.centre = index
                return best
            tried += more

    def fastest(self, target: float) -> tuple[float, int] | None:
        """Learning rate and horizon of the shortest run that ends at the target, by bisection over the horizons.

        A longer horizon with its own best learning rate never ends higher, up to noise.
        """
        low, high = 0, len(HORIZONS) - 1
        if self.run(self.best_lr(HORIZONS[high]), HORIZONS[high]).loss > target:
            return None
        while low < high:
            middle = (low + high) // 2
            if self.run(self.best_lr(HORIZONS[middle]), HORIZONS[middle]).loss <= target:
                high = middle
            else:
                low = middle + 1
        return self.best_lr(HORIZONS[high]), HORIZONS[high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", help="only those whose name begins so")
    parser.add_argument("--output", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    where = machine()
    images = digits()
    task = autoencoder(250, images)
    everyone = contenders()
    chosen = [c for c in everyone if not arguments.contenders or c.name.startswith(tuple(arguments.contenders))]
    chosen = [everyone[0], *(c for c in chosen if c is not everyone[0])]

    first = Search(task, images, chosen[0])
    target = first.run(first.best_lr(LONGEST), LONGEST).loss
    points: list[tuple[Contender, float, int]] = []
    finals: dict[str, tuple[float, float]] = {}
    for contender in chosen:
        # fused and foreach are the same method: one grid
        search = first if contender.name.startswith("AdamW") else Search(task, images, contender)
        point = search.fastest(target)
        lr = search.best_lr(LONGEST)
        finals[contender.name] = (lr, search.run(lr, LONGEST).loss)
        if point is not None:
            points.append((contender, *point))

    seconds: dict[str, list[float]] = {contender.name: [] for contender, _, _ in points}
    losses: dict[str, list[float]] = {contender.name: [] for contender, _, _ in points}
    for seed in (0, 1, 2):
        for contender, lr, horizon in points:
            outcome = train(task, images, contender, lr, horizon, seed)
            seconds[contender.name].append(outcome.seconds)
            losses[contender.name].append(outcome.loss)
    reference = seconds[chosen[0].name]
    lines = [
        "# Time to AdamW's final loss: autoencoder, batch 250",
        "",
        f"{where}.",
        f"Target: {target:.1f}, where AdamW's best run of {LONGEST} steps ends. Three seeds in turns.",
        "",
        "| | best lr | steps | loss there | seconds | AdamW foreach's seconds / its own | loss after 400 steps (lr) |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {contender.name: (lr, horizon) for contender, lr, horizon in points}
    for contender in chosen:
        name = contender.name
        final = f"{finals[name][1]:.1f} ({finals[name][0]:g})"
        if name not in found:
            lines.append(f"| {name} | - | not in {LONGEST} | | | | {final} |")
            continue
        ratios = [a / b for a, b in zip(reference, seconds[name], strict=True)]
        lines.append(
            f"| {name} | {found[name][0]:g} | {found[name][1]} | {min(losses[name]):.1f}-{max(losses[name]):.1f} | "
            f"{statistics.median(seconds[name]):.1f} | {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] | {final} |"
        )
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
