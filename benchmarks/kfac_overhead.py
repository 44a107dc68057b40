"""What a training step with K-FAC costs in steps of SGD, at two pairs of intervals.

python benchmarks/kfac_overhead.py [--repeats 5] [--tasks resnet autoencoder] [--threads 1] [--output FILE]

Contenders take turns of whole intervals of inverses (of half a one where that is 100 steps); ratios are taken within a
turn. A step is forward, backward and optimizer; statistics and inverses are counted wherever they fall.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import gemm_rate, machine, report, spread
from tasks import Task, autoencoder, digits, resnet20
from torch import nn

from lightning_soo import KFAC

TASKS: dict[str, Callable[[], Task]] = {
    "resnet": lambda: resnet20(64),
    "autoencoder": lambda: autoencoder(1000, digits()),
}
# statistics and inverses every so many steps; what an existing library needs on the same two tasks
INTERVALS = ((1, 10), (10, 100))
TARGETS = {("resnet", 1): 3.5, ("resnet", 10): 1.3, ("autoencoder", 1): 2.0, ("autoencoder", 10): 1.5}
EXISTING = {("resnet", 1): 7.7, ("resnet", 10): 1.8, ("autoencoder", 1): 3.2, ("autoencoder", 10): 2.2}
CHEAP = {"damping_method": "pi", "gram_dtype": "bfloat16", "compute_dtype": "bfloat16"}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet": {
        "defaults": {},
        "pi, 64 positions": {"damping_method": "pi", "statistics_positions": 64},
        "pi, 64 positions, bfloat16 products": {**CHEAP, "statistics_positions": 64},
    },
    "autoencoder": {"pi": {"damping_method": "pi"}, "pi, bfloat16 products": CHEAP},
}


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    statistics: int = 0
    inverses: int = 0
    make: Callable[[nn.Module], torch.optim.Optimizer]


def contenders(task: str) -> list[Contender]:
    found = [Contender(name="SGD", make=lambda net: torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9))]
    for every, inverses in INTERVALS:
        for name, settings in SETTINGS[task].items():

            def make(net: nn.Module, settings: Any = settings, every: int = every, inverses: int = inverses) -> KFAC:
                options = {"statistics_frequency": every, "precondition_frequency": inverses, **settings}
                return KFAC(net, lr=1e-4, start_preconditioning_step=10, **options)

            found.append(Contender(name=name, statistics=every, inverses=inverses, make=make))
    return found


class Runner:
    def __init__(self, task: Task, contender: Contender) -> None:
        self.task, self.contender = task, contender
        self.net = task.model()
        self.optimizer = contender.make(self.net)
        self.step = 0
        self.milliseconds: list[float] = []

    def turn(self, steps: int, keep: bool = True) -> None:
        batches = [self.task.batch(self.step + index) for index in range(steps)]
        start = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            self.task.loss(self.net, batch).backward()
            self.optimizer.step()
        if keep:
            self.milliseconds.append(1000 * (time.perf_counter() - start) / steps)
        self.step += steps


def measure(key: str, task: Task, repeats: int, only: set[int]) -> list[str]:
    runners = [Runner(task, one) for one in contenders(key) if one.statistics in only | {0}]
    for runner in runners:
        runner.turn(21 if runner.contender.inverses else 5, keep=False)
    # inverses are spread evenly over their interval, so half of a long one has half of them
    cycles = [min(runner.contender.inverses or 10, 50) for runner in runners]
    for turn in range(repeats):
        for runner, cycle in zip(runners, cycles, strict=True):
            if sys.stderr.isatty():
                print(
                    f"\r{task.name}: turn {turn + 1} of {repeats}, {runner.contender.name:50}", end="", file=sys.stderr
                )
            runner.turn(cycle)
    first = runners[0]
    lines = [
        f"## {task.name}",
        "",
        f"SGD: {statistics.median(first.milliseconds):.1f} ms a step.",
        "",
        "| statistics / inverses every | settings | ms/step | step / SGD step | target | an existing library |",
        "|---|---|---|---|---|---|",
    ]
    for runner in runners[1:]:
        one = runner.contender
        ratios = [a / b for a, b in zip(runner.milliseconds, first.milliseconds, strict=True)]
        lines.append(
            f"| {one.statistics} / {one.inverses} | {one.name} | {statistics.median(runner.milliseconds):.1f} | "
            f"{spread(ratios)} | {TARGETS[key, one.statistics]} | {EXISTING[key, one.statistics]} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--statistics", nargs="+", type=int, default=[every for every, _ in INTERVALS])
    parser.add_argument("--threads", type=int, default=1, help="of torch; inverses are computed on other cores")
    parser.add_argument("--output", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [
        "# What K-FAC adds to a step of SGD",
        "",
        f"{machine()}.",
        f"Products: float32 {gemm_rate(torch.float32) / 1e9:.0f} Gflop/s, bfloat16 "
        f"{gemm_rate(torch.bfloat16) / 1e9:.0f} Gflop/s.",
        f"Median [smallest, largest] of {arguments.repeats} turns.",
        "",
    ]
    for name in arguments.tasks:
        lines += measure(name, TASKS[name](), arguments.repeats, set(arguments.statistics))
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
