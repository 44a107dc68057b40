"""What a training step costs: AdamW, lightning_soo, installed peers, and the bound.

python benchmarks/step_time.py [--repeats 5] [--tasks autoencoder-250 autoencoder-1000 gpt text-gpt] [--output FILE]

Contenders take turns, one refresh cycle each, so that a slow minute of the machine hits all of them; ratios are taken
within a turn. Ours runs with its defaults, the interval as it is once it has grown, and, beside them, with float32
products. Peers take part where installed:
pip install heavyball pytorch_optimizer.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from contenders import GROWN, Contender, Unsuited, choose, contenders
from measure import eigh_seconds, gemm_rate, machine, memory_rate, spread
from tasks import Task, autoencoder, digits, small_gpt, text_gpt

from lightning_soo.placement.costs import product_flops

TASKS = {
    "autoencoder-250": lambda: autoencoder(250, digits()),
    "autoencoder-1000": lambda: autoencoder(1000, digits()),
    "gpt": small_gpt,
    "text-gpt": text_gpt,
}
OURS = ("ours, defaults", "ours, float32", "ours, SOAP")


class Runner:
    """One contender on one task.

    Raises:
        Unsuited: the optimizer cannot train this model.
    """

    def __init__(self, task: Task, contender: Contender) -> None:
        self.task, self.contender = task, contender
        self.net = task.model()
        self.optimizer = contender.make(self.net, 1e-4)
        self.step = 0
        self.whole: list[float] = []  # milliseconds a step, one entry a turn
        self.optimizing: list[float] = []

    def turn(self, steps: int, keep: bool = True) -> None:
        batches = [self.task.batch(self.step + index) for index in range(steps)]
        optimizing, start = 0.0, time.perf_counter()
        for batch in batches:
            self.task.loss(self.net, batch).backward()
            before = time.perf_counter()
            self.optimizer.step()
            optimizing += time.perf_counter() - before
            self.optimizer.zero_grad()
        if self.contender.ours is not None:
            self.optimizer.close()  # roots still being computed belong to this turn
        whole = time.perf_counter() - start
        self.step += steps
        if keep:
            self.whole.append(1000 * whole / steps)
            self.optimizing.append(1000 * optimizing / steps)

    def warm_up(self) -> None:
        """Until costs repeat: every root is in use."""
        for _ in range(math.ceil(self.contender.warm_up / self.contender.cycle)):
            self.turn(self.contender.cycle, keep=False)

    def bound(self, rates: dict[str, float]) -> float:
        """Milliseconds a step that flops and bytes allow: what no implementation of this method can beat here.

        Model: task.flops at the float32 rate. Optimizer: 7 passes over the parameters (read parameter, gradient and
        two moments, write three). Preconditioning an m x n block: 2mn(m + n) flops, three times as many for SOAP, which
        rotates the gradient and its mean, and what comes of them back; its statistics, of which symmetry allows half:
        mn(m + n) each time, in float32; its roots: an eigendecomposition of each side, scaled by n^3 from n = 1000, as
        many at once as there are threads.
        """
        numel = sum(parameter.numel() for parameter in self.net.parameters())
        seconds = self.task.flops / rates["float32"] + 7 * 4 * numel / rates["memory"]
        if self.contender.ours is not None:
            options = self.optimizer.options
            products = 3 if self.optimizer.block_class.needs_gradient else 1
            for unit in self.optimizer.attach().units:
                dtype = self.optimizer.compute_dtypes()[unit.key]
                flops = product_flops(unit.block)
                seconds += products * flops / rates[str(dtype).removeprefix("torch.")]
                seconds += flops / 2 / rates["float32"] / options.statistics_frequency
                roots = sum((order / 1000) ** 3 for order in unit.block.orders) * rates["eigh"]
                seconds += roots / torch.get_num_threads() / options.precondition_frequency.max
        return 1000 * seconds


def measure(task: Task, rates: dict[str, float], repeats: int, chosen: list[Contender]) -> list[str]:
    runners, left_out = [], []
    for contender in chosen:
        try:
            runners.append(Runner(task, contender))
        except Unsuited as reason:
            left_out.append(f"{contender.name}: {reason}.")
    for runner in runners:
        runner.warm_up()
    for turn in range(repeats):
        for runner in runners:
            if sys.stderr.isatty():
                print(
                    f"\r{task.name}: turn {turn + 1} of {repeats}, {runner.contender.name:50}", end="", file=sys.stderr
                )
            runner.turn(runner.contender.cycle)
    first = runners[0]
    lines = [
        f"## {task.name}",
        "",
        "| | ms/step | whole step / AdamW foreach | optimizer step / AdamW foreach | bound, ms | measured / bound |",
        "|---|---|---|---|---|---|",
    ]
    for runner in runners:
        whole = [a / b for a, b in zip(runner.whole, first.whole, strict=True)]
        optimizing = [a / b for a, b in zip(runner.optimizing, first.optimizing, strict=True)]
        median = sorted(runner.whole)[len(runner.whole) // 2]
        has_bound = runner.contender.ours is not None or runner.contender.name.startswith("AdamW")
        bound = runner.bound(rates) if has_bound else 0.0
        lines.append(
            f"| {runner.contender.name} | {median:.1f} | {spread(whole)} | {spread(optimizing)} | "
            + (f"{bound:.1f} | {median / bound:.2f} |" if has_bound else "| |")
        )
    return [*lines, "", *left_out, *[""] * bool(left_out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--contenders", nargs="+", help="those whose name begins so, and AdamW foreach")
    parser.add_argument("--threads", type=int, help="torch threads; as torch decides by default")
    parser.add_argument("--output", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = choose(arguments.contenders, **GROWN) if arguments.contenders else contenders(OURS, **GROWN)
    rates = {
        "float32": gemm_rate(torch.float32),
        "bfloat16": gemm_rate(torch.bfloat16),
        "memory": memory_rate(),
        "eigh": eigh_seconds(),
    }
    lines = [
        "# Step time",
        "",
        f"{machine()}.",
        f"Rates: float32 product {rates['float32'] / 1e9:.0f} Gflop/s, bfloat16 {rates['bfloat16'] / 1e9:.0f} Gflop/s "
        f"({rates['bfloat16'] / rates['float32']:.2f} times as fast), "
        f"copy {rates['memory'] / 1e9:.0f} GB/s, float64 eigh of order 1000 (one thread) "
        f"{rates['eigh'] * 1000:.0f} ms.",
        f"Median [smallest, largest] of {arguments.repeats} turns; a turn is one refresh cycle, refreshes counted.",
        "",
    ]
    print("\n".join(lines))
    for name in arguments.tasks:
        found = measure(TASKS[name](), rates, arguments.repeats, chosen)
        print("\n".join(found), flush=True)
        lines += found
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
