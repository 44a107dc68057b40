"""Chains of neighbouring elements, for methods whose preconditioner is a band (SONew): where sharding cuts them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_soo.placement.layout import FragmentTable

CHAINS = ("row", "flat")


def chain_length(shape: tuple[int, ...], chain: str) -> int:
    """Elements in one chain: ``"row"`` is one for each output (a row of the matrix view), ``"flat"`` the parameter."""
    if chain not in CHAINS:
        raise ValueError(f"chain={chain!r}: choose one of {', '.join(CHAINS)}")
    return math.prod(shape[1:]) if chain == "row" and len(shape) > 1 else math.prod(shape)


def extended(start: int, stop: int, length: int, reach: tuple[int, int]) -> tuple[int, int]:
    """``[start, stop)`` with as many neighbours of the same chains on each side as ``reach`` says."""
    if start == stop:
        return start, stop
    return start - min(reach[0], start % length), stop + min(reach[1], -stop % length)


def cut_chains(ranges: Sequence[tuple[int, int]], length: int) -> list[int]:
    """Numbers of the chains that no rank holds completely."""
    return sorted({start // length for start, stop in ranges if start < stop and start % length})


@dataclass(frozen=True, kw_only=True)
class Strip:
    """Elements ``[start, stop)`` of a parameter that one place sends to another."""

    parameter: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Halos:
    """What travels between the ranks of one copy of the model in every step, in order: a few elements at each cut.

    Attributes:
        strips: ``[source][destination]``.
        cut: ``(parameter, chain)`` of every chain that is held in parts, the same on every rank.
    """

    strips: tuple[tuple[tuple[Strip, ...], ...], ...]
    cut: tuple[tuple[int, int], ...]

    @classmethod
    def plan(
        cls, table: FragmentTable, lengths: Sequence[int | None], parameters: Sequence[int], reach: tuple[int, int]
    ) -> Halos:
        """For the given parameters; ``lengths`` are of all, None where there are no chains."""
        copy = table.copy_of(0)
        strips: list[list[list[Strip]]] = [[[] for _ in copy] for _ in copy]
        cut: list[tuple[int, int]] = []
        for parameter in parameters:
            length = lengths[parameter]
            ranges = [table.ranges[rank][parameter] for rank in copy]
            if length is None or not (found := cut_chains(ranges, length)):
                continue
            cut += [(parameter, chain) for chain in found]
            holders = sorted((low, high, source) for source, (low, high) in enumerate(ranges) if low < high)
            ends = [high for _, high, _ in holders]
            for destination, (start, stop) in enumerate(ranges):
                begin, end = extended(start, stop, length, reach)
                for low, high, source in holders[bisect_right(ends, begin) :]:
                    if low >= end:
                        break
                    for first, last in ((max(begin, low), min(start, high)), (max(stop, low), min(end, high))):
                        if first < last and source != destination:
                            strips[source][destination].append(Strip(parameter=parameter, start=first, stop=last))
        return cls(strips=tuple(tuple(tuple(found) for found in row) for row in strips), cut=tuple(cut))

    @property
    def is_empty(self) -> bool:
        return not self.cut

    @property
    def elements(self) -> int:
        """The most neighbours that any rank sends or receives in a step."""

        def size(strips: tuple[Strip, ...]) -> int:
            return sum(strip.stop - strip.start for strip in strips)

        sent = [sum(map(size, row)) for row in self.strips]
        received = [sum(size(row[place]) for row in self.strips) for place in range(len(self.strips))]
        return max([*sent, *received], default=0)
