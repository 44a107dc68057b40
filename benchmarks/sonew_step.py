"""Tridiagonal SONew against torch's AdamW: one float32 tensor, whole step, interleaved, median.

    OMP_NUM_THREADS=1 python benchmarks/sonew_step.py 10000000

SONew's step is statistics, direction, Adam graft, and moving the parameter with decoupled weight decay. Bytes per
element (float32, every array once): AdamW 28; SONew 44, and 48 with a ridge per element.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from lightning_soo.preconditioners.banded import BandedStatistics, direction
from lightning_soo.preconditioners.tridiagonal import tridiagonal_step

CHAIN, LR, DECAY = 1000, 1e-4, 1e-6


def adamw(gradient: torch.Tensor, **options: bool) -> Callable[[], object]:
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    return torch.optim.AdamW([parameter], lr=LR, weight_decay=DECAY, **options).step


def sonew(gradient: torch.Tensor, *, chunk: int, compiled: bool, relative: bool) -> Callable[[], object]:
    n = gradient.numel()
    parameter, momentum, out, ridges = (torch.zeros_like(gradient) for _ in range(4))
    statistics = BandedStatistics.zeros(n, 1, chain_length=CHAIN)

    def step() -> None:
        correction = 1 - 0.99 ** (statistics.observations + 1)
        # the peaks of the statistics before this step: one sweep instead of two
        ridge = statistics.relative_ridge(1e-6, out=ridges) if relative else 1e-8
        moved, graft = tridiagonal_step(
            statistics, gradient, momentum, beta1=0.9, decay=0.99, weight=0.01, magnitude=5.0, correction=correction,
            eps=1e-8, ridge=ridge, gamma=1e-5, out=out, chunk=chunk, compiled=compiled,
        )  # fmt: skip
        factor = LR * float((graft / moved).sqrt()) / (1 - 0.9**statistics.observations)
        for first in range(0, n, chunk):
            piece = slice(first, first + chunk)
            parameter[piece].mul_(1 - LR * DECAY).add_(out[piece], alpha=-factor)

    return step


def separate(gradient: torch.Tensor, bandwidth: int) -> Callable[[], object]:
    momentum, out = torch.zeros_like(gradient), torch.zeros_like(gradient)
    statistics = BandedStatistics.zeros(gradient.numel(), bandwidth, chain_length=CHAIN)

    def step() -> None:
        momentum.lerp_(gradient, 0.1)
        statistics.observe(gradient, decay=0.99, weight=0.01, magnitude=5.0)
        direction(statistics.bands, momentum, ridge=1e-6, gamma=1e-3, out=out)

    return step


def main() -> None:
    n = int(float(sys.argv[1])) if len(sys.argv) > 1 else 1_000_000
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0))
    gradient = noise + 0.9 * noise.roll(1)
    candidates = {
        "AdamW foreach": (adamw(gradient, foreach=True), 28),
        "AdamW fused": (adamw(gradient, fused=True), 28),
        "SONew eager": (sonew(gradient, chunk=1 << 18, compiled=False, relative=False), 44),
        "SONew eager, ridge per row": (sonew(gradient, chunk=1 << 18, compiled=False, relative=True), 48),
        "SONew compiled": (sonew(gradient, chunk=1 << 18, compiled=True, relative=False), 44),
        "SONew compiled, ridge per row": (sonew(gradient, chunk=1 << 18, compiled=True, relative=True), 48),
        "observe + direction, b = 1": (separate(gradient, 1), 0),
        "observe + direction, b = 4": (separate(gradient, 4), 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    rounds = max(5, min(31, 60_000_000 // n))
    for index in range(rounds + 3):  # the first rounds warm up
        for name, (step, _) in candidates.items():
            began = time.perf_counter()
            step()
            if index >= 3:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    print(f"{n} elements, torch {torch.__version__}, {torch.get_num_threads()} thread(s), {rounds} rounds")
    for name, (_, size) in candidates.items():
        bandwidth = f"{size * n / medians[name] / 1e9:6.1f} GB/s" if size else ""
        ratio = medians[name] / medians["AdamW foreach"]
        print(f"{name:32s} {medians[name] * 1e3:8.2f} ms   {ratio:5.2f} x foreach   {bandwidth}")


if __name__ == "__main__":
    main()
