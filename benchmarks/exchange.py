"""What Shampoo's step sends under each engine: bytes and time against the plan, and against gathering every step.

python benchmarks/exchange.py [--ranks 2 4] [--engines ddp fsdp1 fsdp2 zero-2] [--output FILE]

The small GPT on text in worlds of gloo ranks, one thread each. Bytes are those a rank receives inside the optimizer's
step, counted at torch's collectives over whole refresh intervals; the largest rank's. The alternatives are an
all_gather in every step: of all gradients (or of the directions, which are as large), so that each rank has every
matrix whole, and of all roots.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from contenders import GROWN
from measure import machine, report
from tasks import text_gpt
from world import ENGINES, Training, Watched, options, parsed, start_world

from lightning_soo import Shampoo
from lightning_soo.placement.plan import Plan, Unit


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank of one engine."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    task = text_gpt(batch_size=2 * ranks)
    training = Training(
        arguments["engine"],
        task.model(),
        lambda model: Shampoo(model, lr=1e-3, betas=(0.9, 0.99), **GROWN),
        micro_batch=2,
    )
    optimizer = training.optimizer
    interval = optimizer.options.precondition_frequency.max
    watched = Watched(optimizer)
    for step in range((arguments["warm_up"] + arguments["intervals"]) * interval):
        if step == arguments["warm_up"] * interval:
            watched.clear()
        training.backward(task.batch(step)[2 * rank : 2 * rank + 2])
        dist.barrier()
        training.step()
    plan = optimizer._plan
    gradients = sum(4 * math.prod(p.spec.shape) for p in plan.parameters if p.is_preconditioned)
    roots = round(sum(unit.root_bytes * triangle(unit) for unit in plan.units))
    optimizer.close()
    return {
        "interval": interval,
        "milliseconds": 1000 * statistics.median(watched.seconds),
        "received": {kind: count / len(watched.seconds) for kind, count in watched.received.items()},
        "planned": planned(plan, rank, interval, optimizer.options.statistics_frequency),
        "exchange_bytes": plan.exchange_bytes,
        "alternatives": {
            name: {"bytes": size * (ranks - 1) // ranks, "milliseconds": gathering(size // ranks)}
            for name, size in {"gradients": gradients, "roots": roots}.items()
        },
    }


def planned(plan: Plan, rank: int, interval: int, statistics_frequency: int) -> dict[str, float]:
    """Bytes a step that this rank receives, from the plan alone.

    Gradients of cut blocks: to their homes once for the direction and, where statistics see them, once more; and the
    directions back. Roots go to homes, and statistics to refreshers, once an interval, as triangles.
    """
    place = plan.table.shard[rank]
    to_homes = back = 0
    for buckets in plan.buckets.values():
        for bucket in buckets:
            come, gone = bucket.received(place), bucket.sent(place)
            to_homes += (sum(come) - come[place]) * bucket.dtype.itemsize
            back += (sum(gone) - gone[place]) * bucket.dtype.itemsize
    mine = [unit for unit in plan.units if unit.refresher == rank and unit.place.keeper != rank]
    roots = sum(u.root_bytes * triangle(u) for u in plan.units if rank in u.homes and u.refresher != rank)
    moved = sum(unit.statistics_bytes * triangle(unit) for unit in mine)
    return {
        "gradients": to_homes * (plan.exchanges + 1 / statistics_frequency) + back,
        "roots": roots / interval,
        "statistics": moved / interval,
    }


def triangle(unit: Unit) -> float:
    """Share of its symmetric matrices that is one half and the diagonal."""
    return sum(n * (n + 1) / 2 for n in unit.block.orders) / sum(n * n for n in unit.block.orders)


def gathering(size: int, repeats: int = 7) -> float:
    """Milliseconds of an all_gather to which each rank gives ``size`` bytes."""
    own = torch.zeros(max(1, size), dtype=torch.uint8)
    whole = torch.empty(dist.get_world_size() * own.numel(), dtype=torch.uint8)
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather_into_tensor(whole, own)
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def row(engine: str, ranks: int, found: list[dict[str, Any]]) -> str:
    received = max(sum(one["received"].values()) for one in found)
    expected = max(sum(one["planned"].values()) for one in found)
    kinds = ", ".join(f"{kind} {count / 1024:.0f}" for kind, count in sorted(found[0]["received"].items()))
    alternatives = [
        f"{found[0]['alternatives'][name]['bytes'] / 1024:.0f} | "
        f"{max(one['alternatives'][name]['milliseconds'] for one in found):.1f}"
        for name in ("gradients", "roots")
    ]
    return (
        f"| {engine} | {ranks} | {received / 1024:.0f} ({kinds}) | {expected / 1024:.0f} | "
        f"{found[0]['exchange_bytes'] / 1024:.0f} | {max(one['milliseconds'] for one in found):.1f} | "
        f"{' | '.join(alternatives)} |"
    )


def main() -> None:
    parser = options(__doc__, [2, 4])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--intervals", type=int, default=1, help="that are counted")
    arguments = parsed(parser, work)
    rows = []
    for ranks in arguments.ranks:
        for engine in arguments.engines:
            given = {"engine": engine, "warm_up": arguments.warm_up, "intervals": arguments.intervals}
            rows.append(row(engine, ranks, start_world(__file__, ranks, given)))
            print(rows[-1], file=sys.stderr)
    lines = [
        "# What is exchanged",
        "",
        f"{machine()}; {os.cpu_count()} cores, shared by all ranks.",
        f"{text_gpt().name.rpartition(',')[0]}, 2 x 128 tokens a rank, gloo. KiB that a rank receives in a step, the "
        "largest rank's; milliseconds of the optimizer's step, the median of the slowest rank. *Cut blocks* is the "
        "plan's own figure: gradients one way.",
        "",
        "| engine | ranks | KiB received (of rank 0) | planned | cut blocks, one way | step, ms "
        "| gathering gradients, KiB | ms | gathering roots, KiB | ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
