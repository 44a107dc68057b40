"""Predicted over measured time of the optimizer's step and of its refreshes, on this machine.

python benchmarks/planned.py [--tasks autoencoder gpt] [--ranks 1 2 4] [--output FILE]

Each run is a world of gloo ranks of one thread. A prediction is made as `lightning-soo plan` makes it: a model on the
meta device and a table made up for the engine. The rates are this machine's, measured by all ranks at once before and
after the steps.
Gradients are random numbers: steps are measured, no training. Measured is the median step without refreshes of the
slowest rank, and the seconds that the slowest rank's refreshes took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import machine, report
from tasks import autoencoder, small_gpt
from torch import nn

from lightning_soo import Shampoo
from lightning_soo.optim.planned import PlannedOptimizer
from lightning_soo.planning.estimates import estimate, refresh_seconds
from lightning_soo.planning.machine import Machine, measured

MODELS: dict[str, Callable[[], nn.Module]] = {
    "autoencoder": lambda: autoencoder(250, torch.zeros(250, 784)).model(),
    "gpt": lambda: small_gpt().model(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"compute_dtype": "float32"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}
INTERVAL, START, STEPS = 6, 2, 17
MOVED = "roots and statistics moved"  # not in a step without refreshes


def make(net: nn.Module, settings: str) -> Shampoo:
    return Shampoo(
        net,
        lr=1e-4,
        statistics_frequency=1,
        precondition_frequency=INTERVAL,
        start_preconditioning_step=START,
        refresh_delay=0,
        stagger=False,
        workers="inline",
        **OPTIONS[settings],
    )


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median seconds, every rank beginning together."""
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def mean_over_ranks(values: list[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def rates(dtype: torch.dtype) -> Machine:
    """This machine's with all ranks at work; between ranks from a tiny reduction and from 8 MiB to everybody."""
    dist.barrier()
    own = measured(Machine(), dtype)
    ranks = dist.get_world_size()
    latency = bandwidth = 0.0
    if ranks > 1:
        tiny, source = torch.zeros(16), torch.zeros(ranks * ((1 << 21) // ranks))
        target = torch.empty_like(source)
        latency = timed(lambda: dist.all_reduce(tiny), 50)
        sent = source.numel() * 4 * (ranks - 1) / ranks
        bandwidth = sent / max(timed(lambda: dist.all_to_all_single(target, source), 15) - latency, 1e-6)
    names = ("flops", "statistics_flops", "core_rate", "memory_bandwidth", "operation")
    means = dict(zip(names, mean_over_ranks([getattr(own, name) for name in names]), strict=True))
    found = replace(own, **means)
    if ranks > 1:
        latency, bandwidth = mean_over_ranks([latency, bandwidth])
        found = replace(found, latency=latency, shard_bandwidth=bandwidth, replicate_bandwidth=bandwidth)
    return found


def slowest(value: float) -> float:
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def measure_run(task: str, engine: str, settings: str) -> tuple[float, float, Machine]:
    """Median step without refreshes, and refreshes of an interval, in seconds on the slowest rank; the rates."""
    net = MODELS[task]()
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net)
    optimizer = make(net, settings)
    optimizer.attach(net)
    gradients = [[torch.randn_like(p) for p in net.parameters()] for _ in range(3)]
    quiet, busy = [], []
    chosen = optimizer.options.compute_dtype
    dtype = chosen if isinstance(chosen, torch.dtype) else torch.float32
    before = rates(dtype)
    for step in range(1, STEPS + 1):
        for parameter, gradient in zip(net.parameters(), gradients[step % 3], strict=True):
            parameter.grad = gradient.clone()
        dist.barrier()
        begin = time.perf_counter()
        optimizer.step()
        seconds = slowest(time.perf_counter() - begin)
        refreshes = step == START or (step > START and step % INTERVAL == 0)
        if refreshes:
            mine = [b for b in _blocks(optimizer) if _refresher(optimizer, b.block.key) == dist.get_rank()]
            busy.append(slowest(sum(block.diagnostics["seconds"] for block in mine)))
        elif step > START + 1:
            quiet.append(seconds)
    return statistics.median(quiet), statistics.median(busy), between(before, rates(dtype))


def between(one: Machine, other: Machine) -> Machine:
    """Means of rates as times: what is twice as slow counts twice."""
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in vars(one)}
    return Machine(**{name: 2.0 / (1.0 / a + 1.0 / b) if a and b else a for name, (a, b) in pairs.items()})


def _blocks(optimizer: PlannedOptimizer) -> list[Any]:
    return [block for member in optimizer._members for block in member.blocks]


def _refresher(optimizer: PlannedOptimizer, key: str) -> int:
    assert optimizer._refresher is not None
    return optimizer._refresher.places[key].refresher


def predict(task: str, engine: str, settings: str, ranks: int, found: Machine) -> tuple[float, float, dict[str, float]]:
    """The same from names and shapes alone."""
    with torch.device("meta"):
        optimizer = make(MODELS[task](), settings)
    planned = estimate(optimizer, optimizer.plan_elsewhere(engine, ranks))
    parts = {name: values for name, values in planned.seconds(found).items() if name != MOVED}
    step = sum(parts.values())
    rank = int(step.argmax())
    refreshes = float(refresh_seconds(planned, found).max())
    return float(step.max()), refreshes, {name: float(values[rank]) for name, values in parts.items()}


def work(task: str, engine: str, settings: str) -> None:
    """One rank; the first one prints a line of json."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    step, refreshes, found = measure_run(task, engine, settings)
    planned_step, planned_refreshes, parts = predict(task, engine, settings, dist.get_world_size(), found)
    if dist.get_rank() == 0:
        row = {"measured": [step, refreshes], "predicted": [planned_step, planned_refreshes], "parts": parts}
        print(json.dumps({**row, "rates": vars(found)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def one_world(task: str, engine: str, settings: str, ranks: int) -> dict[str, Any]:
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
            *(__file__, "--worker", task, engine, settings),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if run.returncode:
        raise SystemExit(run.stderr[-4000:])
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--settings", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    torch.set_num_threads(1)
    rows: list[str] = []
    ratios: dict[str, list[float]] = {"step": [], "refreshes": []}
    for task in arguments.tasks:
        for settings in arguments.settings:
            for ranks in arguments.ranks:
                for engine in ("single",) if ranks == 1 else ("ddp", "fsdp2"):
                    found = one_world(task, engine, settings, ranks)
                    pairs = list(zip(found["predicted"], found["measured"], strict=True))
                    for name, (predicted, real) in zip(ratios, pairs, strict=True):
                        ratios[name].append(predicted / real)
                    cells = [f"{1000 * p:.0f} | {1000 * m:.0f} | {p / m:.2f}" for p, m in pairs]
                    rows.append(f"| {task}, {settings} | {engine} | {ranks} | {' | '.join(cells)} |")
                    parts = ", ".join(f"{name} {1000 * value:.1f}" for name, value in found["parts"].items())
                    print(rows[-1], parts, {k: f"{v:.3g}" for k, v in found["rates"].items()}, flush=True)
    lines = [
        "# Predicted and measured time of a step",
        "",
        f"{machine()}.",
        f"Ranks of one thread each on {os.cpu_count()} cores; statistics in every step, blocks of at most 1024.",
        "Milliseconds: a step without refreshes, and the refreshes of one interval, of the slowest rank.",
        "",
        "| | engine | ranks | step predicted | measured | ratio | refreshes predicted | measured | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        *(
            f"{name}: median of predicted over measured {statistics.median(found):.2f}, median distance from 1 "
            f"{statistics.median(abs(ratio - 1) for ratio in found):.2f}."
            for name, found in ratios.items()
        ),
    ]
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
