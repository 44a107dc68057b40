"""Compiled steps of banded statistics against the separate functions, which test_banded.py checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soo.linalg import banded
from lightning_soo.preconditioners.banded import BandedStatistics, direction

DECAY, WEIGHT, BETA1, EPS = 0.9, 0.1, 0.8, 1e-8
Both = dict[str, tuple[Tensor, Tensor]]


class Pair:
    """One run twice: its arrays and those that are expected."""

    def __init__(
        self,
        n: int,
        bandwidth: int,
        chain_length: int,
        start: int = 0,
        *,
        dtype: torch.dtype = torch.float64,
        outer: torch.dtype | None = None,
        gamma: float = 1e-3,
        magnitude: float = 1.0,
        per_chain: bool = False,
        owned: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n, self.chain_length, self.start, self.gamma, self.magnitude = n, chain_length, start, gamma, magnitude
        self.per_chain, self.owned, self.outer, self.device = per_chain, owned or (0, n), outer or dtype, device
        self.make = torch.Generator().manual_seed(n + bandwidth)
        self.expected, self.found = (
            BandedStatistics.zeros(n, bandwidth, chain_length=chain_length, start=start, dtype=dtype, device=device)
            for _ in range(2)
        )
        self.moment, self.moment_found = (torch.zeros(n, dtype=self.outer, device=device) for _ in range(2))
        self.total = 0.0

    def step(self, runs: Any) -> None:
        """Take the expected step and add the same to ``runs``."""
        noise = torch.randn(self.n, generator=self.make, dtype=torch.float64)
        gradient = ((noise + 0.9 * noise.roll(1)) * self.magnitude).to(self.outer)
        largest = float(gradient.double().abs().max()) if self.n else 0.0
        gradient = gradient.to(self.device)
        expected, found = self.expected, self.found
        self.total = self.total * DECAY + WEIGHT
        for statistics in (expected, found):
            statistics.rescale(decay=DECAY, magnitude=largest)
        peaks = banded.chain_peaks(expected.bands, self.start, self.chain_length) * 1e-4
        ridge = banded.expand_chains(peaks, self.n, self.start, self.chain_length)
        expected.observe(gradient, decay=DECAY, weight=WEIGHT, magnitude=largest)
        self.moment.lerp_(gradient, 1.0 - BETA1)
        self.moved = direction(expected.bands, self.moment, ridge=ridge, gamma=self.gamma)
        root = (expected.bands[0].double() / self.total).sqrt() / expected.scale
        self.graft = self.moment.double() / (root + EPS)
        self.unit = found.scale * self.total**0.5
        self.out = gradient.clone()
        runs.add(
            self.out,
            self.moment_found,
            found.bands,
            start=self.start,
            chain_length=self.chain_length,
            owned=self.owned,
            beta1=BETA1,
            decay=DECAY,
            weight=WEIGHT,
            scale=found.scale,
            graft_eps=self.unit * EPS,
            ridge=peaks if self.per_chain else 1e-4,
            gamma=self.gamma,
        )

    def both(self, sums: Tensor) -> Both:
        """Found and expected after a step whose sums of squares are ``(2,)``."""
        own = slice(*self.owned)
        squares = torch.stack([self.moved[own].double().square().sum(), self.graft[own].square().sum()])
        return {
            "bands": (self.found.bands, self.expected.bands),
            "momentum": (self.moment_found, self.moment),
            "direction": (self.out, self.moved),
            "direction's square": (sums[0], squares[0]),
            "graft's square": (sums[1] * self.unit**2, squares[1]),
        }


def run_pairs(kind: type[Any], pairs: Sequence[Pair], steps: int) -> list[Both]:
    """Some steps of all pairs together, by compiled code of a ``kind`` and by the separate functions."""
    sums = torch.zeros(0, 2)
    for _ in range(steps):
        runs = kind()
        for pair in pairs:
            pair.step(runs)
        sums = torch.as_tensor(runs.carry_out(), dtype=torch.float64)
    return [pair.both(own) for pair, own in zip(pairs, sums, strict=True)]


def assert_equal(both: Both, tolerance: float) -> None:
    for name, (found, expected) in both.items():
        size = float(expected.double().abs().max()) if expected.numel() else 0.0
        worst = float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0
        assert worst <= tolerance * size, f"{name}: {worst:.2e} of {size:.2e}"


def share_removed(both: Both, gamma: float) -> float:
    """How many edges a threshold removes; a test of removal looks, or nothing would be tested."""
    expected = both["bands"][1]
    _, inverse = banded.factor(expected, 0.0, 0.0)
    return float((inverse <= gamma * expected[0]).double().mean())
