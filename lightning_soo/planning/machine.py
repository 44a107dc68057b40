"""What a machine can do, as predictions of time need it: given, or measured here once."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from lightning_soo.linalg.inverse_roots import inverse_root
from lightning_soo.placement.costs import FLOPS_PER_MILLISECOND_FLOAT64, order_milliseconds

_ORDERS = (64, 256, 512)  # of the decompositions that are timed: a second in all


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one rank.

    The defaults are round numbers of a current accelerator with eight host cores on a 200 Gb/s network, on the cautious
    side.

    Attributes:
        flops: of matrix products in ``compute_dtype``, FLOP/s.
        statistics_flops: of those in float32; None is ``flops``.
        core_rate: float64 products of one CPU core, FLOP/s: how fast roots are computed, against the
            50 GFLOP/s of the core that :mod:`lightning_soo.placement.costs` was measured on.
        cores: CPU cores for a rank's refreshes.
        memory_bandwidth: bytes read and written by elementwise work, a second.
        shard_bandwidth, replicate_bandwidth: bytes a second that a rank sends or receives within one copy of the model,
            and between copies.
        latency: seconds of a collective without data.
        operation: seconds that a small tensor operation takes at least: a kernel launch.
    """

    flops: float = 4e13
    statistics_flops: float | None = None
    core_rate: float = FLOPS_PER_MILLISECOND_FLOAT64 * 1000
    cores: float = 8.0
    memory_bandwidth: float = 1.5e12
    shard_bandwidth: float = 2.5e10
    replicate_bandwidth: float = 2.5e10
    latency: float = 3e-5
    operation: float = 1e-5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0.0 if name in ("latency", "operation") else math.ulp(0.0)
            if value is not None and not least <= value < math.inf:
                raise ValueError(f"{name}={value}: must be {'at least' if least == 0.0 else 'above'} 0, and finite")

    def bandwidth(self, axis: str) -> float:
        """Bytes a second over ``"shard"``, ``"replicate"``, or the slower of both over ``"all"``."""
        both = {"shard": self.shard_bandwidth, "replicate": self.replicate_bandwidth}
        return both.get(axis, min(both.values()))


def measured(machine: Machine, compute_dtype: torch.dtype = torch.float32) -> Machine:
    """``machine`` with the rates of this one's CPU, as one process with its threads has them: a few seconds.

    Never part of a plan, which must be the same on every rank. Bandwidth and latency between ranks stay as given.
    """
    source = torch.zeros(1 << 24)
    target = torch.empty_like(source)
    small = torch.zeros(64)
    with threadpool_limits(1):  # as a worker's
        ratios = [order_milliseconds(order) / 1000 / _median(_decomposition(order)) for order in _ORDERS]
    return replace(
        machine,
        flops=product_rate(compute_dtype),
        statistics_flops=product_rate(torch.float32),
        core_rate=FLOPS_PER_MILLISECOND_FLOAT64 * 1000 * float(np.median(ratios)),
        memory_bandwidth=2.0 * source.numel() * 4 / _median(lambda: target.copy_(source)),
        operation=_median(lambda: [small.add_(1.0) for _ in range(1000)]) / 1000,
    )


def product_rate(dtype: torch.dtype, order: int = 768) -> float:
    """FLOP/s of a square matrix product here."""
    left, right = (torch.randn(order, order).to(dtype) for _ in range(2))
    return 2.0 * order**3 / _median(lambda: left @ right)


def _decomposition(order: int) -> Callable[[], object]:
    values = np.random.default_rng(0).standard_normal((order, 2 * order))
    matrix = (values @ values.T / order).astype(np.float32)
    return lambda: inverse_root(matrix, 4.0, eps=1e-6)


def _median(run: Callable[[], object]) -> float:
    """What the machine does now, busy or not."""
    return statistics.median(seconds(run))


def seconds(run: Callable[[], object], repeats: int = 7) -> list[float]:
    """Of several runs, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times
