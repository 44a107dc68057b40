"""What travels between the ranks of one copy of the model, and in which order: fixed by the plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from lightning_soo.placement.boxes import Box, volume

Integers = npt.NDArray[np.int64]


class Parts(dict[int, tuple[Box, ...]]):
    """Place in the copy -> the boxes that it holds of a unit, in order; places that hold nothing are left out."""

    @cached_property
    def counts(self) -> dict[int, int]:
        """Elements by place."""
        return {place: sum(map(volume, boxes)) for place, boxes in self.items()}

    @cached_property
    def arrays(self) -> tuple[Integers, Integers]:
        """The places, and the elements of each."""
        return np.array(list(self.counts), dtype=np.int64), np.array(list(self.counts.values()), dtype=np.int64)

    @cached_property
    def total(self) -> int:
        """Elements of the unit."""
        return sum(self.counts.values())


@dataclass(frozen=True, kw_only=True)
class Traveller:
    """A unit that no single fragment contains.

    Attributes:
        unit: its number in the plan.
        box: what it is of the parameter's merged shape.
        home: place in the copy where it is assembled.
        parts: who holds what of it.
        companion: what has to arrive together with it.
    """

    unit: int
    key: str
    parameter: int
    box: Box
    home: int
    dtype: torch.dtype
    parts: Parts
    companion: Traveller | None = None

    @property
    def counts(self) -> dict[int, int]:
        """Elements by place."""
        return self.parts.counts


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

    @cached_property
    def flows(self) -> dict[tuple[int, int], int]:
        """``(place, home)`` -> elements that go there, and whose directions come back; its own part among them."""
        found: dict[tuple[int, int], int] = {}
        for traveller in self.travellers:
            for place, count in traveller.counts.items():
                found[place, traveller.home] = found.get((place, traveller.home), 0) + count
        return found

    @cached_property
    def away(self) -> tuple[Integers, Integers]:
        """Elements that each place sends to others as a holder, and gets from others as a home."""
        leaving, arriving = np.zeros(self.places, dtype=np.int64), np.zeros(self.places, dtype=np.int64)
        for traveller in self.travellers:
            places, counts = traveller.parts.arrays
            own = traveller.counts.get(traveller.home, 0)
            leaving[places] += counts
            leaving[traveller.home] -= own
            arriving[traveller.home] += traveller.parts.total - own
        return leaving, arriving

    def sent(self, place: int) -> list[int]:
        """Elements that ``place`` sends to each home; what comes back from each, on the way back."""
        return [self.flows.get((place, home), 0) for home in range(self.places)]

    def received(self, place: int) -> list[int]:
        """Elements that ``place`` receives from each as a home; what it sends back to each."""
        return [self.flows.get((source, place), 0) for source in range(self.places)]


def fill_buckets(travellers: Iterable[Traveller], places: int, limit: int) -> list[Bucket]:
    """Put travellers into buckets, in order, so that no rank's buffer is above ``limit`` bytes.

    A traveller that is larger by itself gets a bucket of its own: the bound is the larger of the two. Computed from
    the table of all ranks, so every rank gets the same buckets.
    """
    buckets: list[Bucket] = []
    for dtype, alike in itertools.groupby(travellers, key=lambda traveller: traveller.dtype):
        current: list[Traveller] = []
        sent, received, largest = np.zeros(places, dtype=np.int64), np.zeros(places, dtype=np.int64), 0
        for traveller in alike:
            together = [traveller] if traveller.companion is None else [traveller, traveller.companion]
            total = sum(each.parts.total for each in together)
            grown_sent = sent.copy()
            for each in together:
                holders, counts = each.parts.arrays
                grown_sent[holders] += counts
            grown = int(max(grown_sent.max(), received[traveller.home] + total))
            if current and max(grown, largest) * dtype.itemsize > limit:
                buckets.append(Bucket(travellers=tuple(current), places=places, largest=largest))
                current, received, largest = [], np.zeros(places, dtype=np.int64), 0
                grown, grown_sent = total, grown_sent - sent
            current += together
            sent = grown_sent
            received[traveller.home] += total
            largest = max(grown, largest)
        if current:
            buckets.append(Bucket(travellers=tuple(current), places=places, largest=largest))
    return buckets
