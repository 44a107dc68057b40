"""Shampoo's step over AdamW's at 1, 2 and 4 ranks of DDP, with the same global batch and the same batch a rank.

python benchmarks/scaling.py [--ranks 1 2 4] [--turns 5] [--output FILE]

The small GPT on text, one thread a rank. Both optimizers train their own copy in the same world and take turns:
Shampoo one refresh interval, AdamW, whose steps are all alike, a fifth of one; the slowest rank counts.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from contenders import GROWN
from measure import machine, report, spread
from tasks import text_gpt
from world import Training, Watched, options, parsed, start_world

from lightning_soo import Shampoo

GLOBAL_BATCH, RANK_BATCH = 16, 4


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank."""
    rank, ranks, batch_size = dist.get_rank(), dist.get_world_size(), arguments["batch_size"]
    task = text_gpt(batch_size=batch_size * ranks)
    makers = {
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), foreach=True),
        "shampoo": lambda model: Shampoo(model, lr=1e-4, betas=(0.9, 0.99), **GROWN),
    }
    trainings = {name: Training("ddp", task.model(), make, batch_size) for name, make in makers.items()}
    optimizer = trainings["shampoo"].optimizer
    interval = optimizer.options.precondition_frequency.max
    turns = {"adamw": interval // 5, "shampoo": interval}
    steps, watched = dict.fromkeys(trainings, 0), Watched(optimizer)
    seconds: dict[str, list[float]] = {name: [] for name in trainings}

    def turn(name: str) -> None:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(turns[name]):
            training = trainings[name]
            training.backward(task.batch(steps[name])[rank * batch_size : (rank + 1) * batch_size])
            training.step()
            steps[name] += 1
        if name == "shampoo":
            training.optimizer.close()  # roots still being computed belong to this turn
        dist.barrier()
        seconds[name].append((time.perf_counter() - start) / turns[name])

    warm_up = arguments["warm_up"]
    for number in range(warm_up + arguments["turns"]):
        if number == warm_up:
            watched.clear()
        for name in trainings:
            turn(name)
    plan = optimizer._plan
    return {
        "seconds": {name: values[warm_up:] for name, values in seconds.items()},
        "received": sum(watched.received.values()) / (arguments["turns"] * interval),
        "state": plan.state_bytes[rank],
        "load": plan.loads[rank],
    }


def row(ranks: int, batch_size: int, found: list[dict[str, Any]]) -> str:
    slowest = {
        name: [1000 * max(values) for values in zip(*(one["seconds"][name] for one in found), strict=True)]
        for name in ("adamw", "shampoo")
    }
    ratios = [a / b for a, b in zip(slowest["shampoo"], slowest["adamw"], strict=True)]
    loads = ", ".join(f"{one['load']:.1f}" for one in found)
    return (
        f"| {ranks} | {batch_size * ranks} | {batch_size} | {statistics.median(slowest['adamw']):.0f} | "
        f"{statistics.median(slowest['shampoo']):.0f} | {spread(ratios)} | {loads} | "
        f"{max(one['received'] for one in found) / 1024:.0f} | {max(one['state'] for one in found) / 2**20:.1f} |"
    )


def main() -> None:
    parser = options(__doc__, [1, 2, 4])
    parser.add_argument("--turns", type=int, default=5, help="that are counted")
    arguments = parsed(parser, work)
    rows = []
    cells = sorted(
        {(n, max(1, GLOBAL_BATCH // n)) for n in arguments.ranks} | {(n, RANK_BATCH) for n in arguments.ranks}
    )
    for ranks, batch_size in cells:
        found = start_world(
            __file__, ranks, {"batch_size": batch_size, "turns": arguments.turns, "warm_up": arguments.warm_up}
        )
        rows.append(row(ranks, batch_size, found))
        print(rows[-1], file=sys.stderr)
    cores = os.cpu_count() or 1
    lines = [
        "# Scaling over ranks",
        "",
        f"{machine()}; {cores} cores"
        + (f": more than {cores} ranks share them." if max(arguments.ranks) > cores else "."),
        f"{text_gpt().name.rpartition(',')[0]}, windows of 128, DDP on gloo. Milliseconds of a whole step, the slowest "
        f"rank's, median of {arguments.turns} turns of one refresh interval, refreshes counted; ratio with "
        "[smallest, largest]. Refresh work: the plan's milliseconds a step of every rank. KiB: what a rank receives in "
        "the optimizer's step beside the gradients, the largest rank's.",
        "",
        "| ranks | global batch | batch a rank | AdamW, ms | Shampoo, ms | Shampoo / AdamW | refresh work | KiB a step "
        "| preconditioner state, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
