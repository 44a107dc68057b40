"""What travels between the ranks of one copy of the model, and in which order: fixed by the plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_soo.placement.boxes import Box, pieces, volume


@dataclass(frozen=True, kw_only=True)
class Traveller:
    """A unit that no single fragment contains.

    Attributes:
        unit: its number in the plan.
        box: what it is of the parameter's merged shape.
        home: place in the copy where it is assembled.
        parts: for each place in the copy, the boxes it holds, in order.
        companion: what has to arrive together with it.
    """

    unit: int
    key: str
    parameter: int
    box: Box
    home: int
    dtype: torch.dtype
    parts: tuple[tuple[Box, ...], ...]
    companion: Traveller | None = None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Elements by place."""
        return tuple(sum(map(volume, boxes)) for boxes in self.parts)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Travellers of one dtype that share one collective.

    Attributes:
        largest: elements of the largest buffer that any rank sends or receives.
    """

    travellers: tuple[Traveller, ...]
    places: int
    largest: int

    @property
    def dtype(self) -> torch.dtype:
        return self.travellers[0].dtype

    @property
    def largest_bytes(self) -> int:
        return self.largest * self.dtype.itemsize

    def sent(self, place: int) -> list[int]:
        """Elements that ``place`` sends to each home; what comes back from each, on the way back."""
        counts = [0] * self.places
        for traveller in self.travellers:
            counts[traveller.home] += traveller.counts[place]
        return counts

    def received(self, place: int) -> list[int]:
        """Elements that ``place`` receives from each as a home; what it sends back to each."""
        mine = [traveller.counts for traveller in self.travellers if traveller.home == place]
        return [sum(column) for column in zip(*mine, strict=True)] if mine else [0] * self.places


def travel_parts(shape: tuple[int, ...], box: Box, ranges: Sequence[tuple[int, int]]) -> tuple[tuple[Box, ...], ...]:
    """The boxes of one unit that each place holds."""
    return tuple(tuple(pieces(shape, box, start, stop)) for start, stop in ranges)


def fill_buckets(travellers: Iterable[Traveller], places: int, limit: int) -> list[Bucket]:
    """Put travellers into buckets, in order, so that no rank's buffer is above ``limit`` bytes.

    A traveller that is larger by itself gets a bucket of its own: the bound is the larger of the two. Computed from
    the table of all ranks, so every rank gets the same buckets.
    """
    buckets: list[Bucket] = []
    for dtype, alike in itertools.groupby(travellers, key=lambda traveller: traveller.dtype):
        current: list[Traveller] = []
        sent, received, largest = [0] * places, [0] * places, 0
        for traveller in alike:
            counts = traveller.counts
            if traveller.companion is not None:
                counts = tuple(a + b for a, b in zip(counts, traveller.companion.counts, strict=True))
            grown = max(*(a + b for a, b in zip(sent, counts, strict=True)), received[traveller.home] + sum(counts))
            if current and max(grown, largest) * dtype.itemsize > limit:
                buckets.append(Bucket(travellers=tuple(current), places=places, largest=largest))
                current, sent, received, largest = [], [0] * places, [0] * places, 0
                grown = sum(counts)
            current += [traveller] if traveller.companion is None else [traveller, traveller.companion]
            sent = [a + b for a, b in zip(sent, counts, strict=True)]
            received[traveller.home] += sum(counts)
            largest = max(largest, grown)
        if current:
            buckets.append(Bucket(travellers=tuple(current), places=places, largest=largest))
    return buckets
