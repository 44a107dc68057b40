"""Which positions of a convolution's output enter its factors: all of them, or a regular grid that moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_soo.capture.factors import Statistics


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every ``steps``-th position from ``offsets`` on, of each dimension.

    It depends on the output's size and the phase alone, so that no split of the examples changes it. The gradient
    factor is multiplied by ``prod(steps)``, one over the chance of a position to be taken, and not by the share that
    was taken: its mean over all offsets is then what all positions give, also where a step does not divide a size.
    """

    steps: tuple[int, ...]
    offsets: tuple[int, ...]
    kept: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], how: Statistics) -> Grid:
        """At most about ``how.positions`` positions of an output of ``sizes``."""
        steps = [1] * len(sizes)
        limit = how.positions if how.positions is not None else math.prod(sizes)
        while math.prod(counts := _counts(sizes, steps)) > limit and max(counts) > 1:
            steps[counts.index(max(counts))] += 1
        offsets = _offsets(steps, how.phase)
        kept = [-(-(size - offset) // step) for size, offset, step in zip(sizes, offsets, steps, strict=True)]
        return cls(steps=tuple(steps), offsets=tuple(offsets), kept=tuple(kept))

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(offset, None, step) for offset, step in zip(self.offsets, self.steps, strict=True))


def output_sizes(padded: Tensor, module: Any) -> list[int]:
    """Of a convolution of a padded input ``(examples, channels, *size)``."""
    dimensions = zip(padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    return [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in dimensions]


def _counts(sizes: Sequence[int], steps: Sequence[int]) -> list[int]:
    return [-(-size // step) for size, step in zip(sizes, steps, strict=True)]


def _offsets(steps: Sequence[int], phase: int) -> list[int]:
    """Scattered, not one after the other: with statistics at every tenth step a cycle would meet few of them."""
    state = (phase + 1) * 0x9E3779B97F4A7C15 % 2**64
    # the finaliser of SplitMix64 (Steele, Lea and Flood 2014)
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    state ^= state >> 31
    offsets = []
    for step in steps:
        offsets.append(state % step)
        state //= step
    return offsets
