"""Which places of one copy of the model hold which elements, asked by range: sharding cuts layers alike."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from lightning_soo.placement.boxes import Box, flat_span, pieces
from lightning_soo.placement.exchange import Parts
from lightning_soo.placement.layout import FragmentTable

Range = tuple[int, int]


class Holders:
    """What every place of a copy holds of one parameter, and of all others that are cut in the same way."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        """
        Args:
            ranges: ``(start, stop)`` by place; empty where a place holds nothing.
        """
        self.ranges = ranges
        self._filled = [(start, stop, place) for place, (start, stop) in enumerate(ranges) if start < stop]
        self._stops = [stop for _, stop, _ in self._filled]
        self._in_order = all(one[1] <= other[0] for one, other in itertools.pairwise(self._filled))
        self._parts: dict[tuple[tuple[int, ...], Box], Parts] = {}

    def overlapping(self, start: int, stop: int) -> list[int]:
        """The places that hold some of the elements ``[start, stop)``, in order."""
        if not self._in_order:  # every place holds everything
            return [place for first, last, place in self._filled if first < stop and start < last]
        found = []
        for first, _, place in self._filled[bisect.bisect_right(self._stops, start) :]:
            if first >= stop:
                break
            found.append(place)
        return found

    def holding(self, shape: tuple[int, ...], box: Box) -> list[int]:
        """The places that hold all of a box of the parameter's merged shape."""
        first, last = flat_span(shape, box)
        return [
            place
            for place in self.overlapping(first, last + 1)
            if self.ranges[place][0] <= first and last < self.ranges[place][1]
        ]

    def parts(self, shape: tuple[int, ...], box: Box) -> Parts:
        """The boxes that each place holds of a box."""
        key = shape, box
        if key not in self._parts:
            first, last = flat_span(shape, box)
            found = {
                place: tuple(pieces(shape, box, *self.ranges[place])) for place in self.overlapping(first, last + 1)
            }
            self._parts[key] = Parts({place: boxes for place, boxes in found.items() if boxes})
        return self._parts[key]


def holders_of(table: FragmentTable) -> list[Holders]:
    """Of every parameter, in one copy of the model; the same object for parameters that are cut alike."""
    known: dict[tuple[Range, ...], Holders] = {}
    found = []
    for ranges in zip(*(table.ranges[rank] for rank in table.copy_of(0)), strict=True):
        if ranges not in known:
            known[ranges] = Holders(ranges)
        found.append(known[ranges])
    return found
