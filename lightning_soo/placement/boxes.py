"""Where a box of a parameter meets a run of its row-major elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Box = tuple[tuple[int, int], ...]


def decompose(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut the elements ``[start, stop)`` of a row-major tensor into boxes, in order.

    At most ``2 ndim - 1`` of them; for a matrix: the end of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return []
    if not shape:
        return [()]
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        return [((first, first + 1), *box) for box in decompose(shape[1:], head, tail)]
    boxes: list[Box] = []
    if head:
        boxes += [((first, first + 1), *box) for box in decompose(shape[1:], head, inner)]
        first += 1
    if last > first:
        boxes.append(((first, last), *((0, size) for size in shape[1:])))
    if tail:
        boxes += [((last, last + 1), *box) for box in decompose(shape[1:], 0, tail)]
    return boxes


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes share, or None."""
    shared = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def volume(box: Box) -> int:
    """Number of elements."""
    return math.prod(stop - start for start, stop in box)


def pieces(shape: tuple[int, ...], box: Box, start: int, stop: int) -> list[Box]:
    """The parts of ``box`` that lie in the elements ``[start, stop)`` of a row-major tensor of ``shape``."""
    first, last = flat_span(shape, box)
    if stop <= first or start > last:
        return []
    if start <= first and last < stop:
        return [box]
    found = [intersect(box, run) for run in decompose(shape, max(start, first), min(stop, last + 1))]
    return [piece for piece in found if piece is not None]


def flat_span(shape: tuple[int, ...], box: Box) -> tuple[int, int]:
    """Row-major positions of a box's first and last element."""
    first = last = 0
    for size, (start, stop) in zip(shape, box, strict=True):
        first, last = first * size + start, last * size + stop - 1
    return first, last


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def within(inner: Box, outer: Box) -> Box:
    """``inner`` in coordinates that begin at ``outer``'s corner."""
    return tuple((start - corner, stop - corner) for (start, stop), (corner, _) in zip(inner, outer, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    """For indexing."""
    return tuple(slice(start, stop) for start, stop in box)


def tiled(boxes: Sequence[Box]) -> tuple[Box, tuple[int, ...]] | None:
    """The box that equal boxes tile, and how many there are in each dimension; None if they do not.

    Args:
        boxes: of one shape, different from each other, in row-major order.
    """
    whole = tuple((min(s for s, _ in sides), max(s for _, s in sides)) for sides in zip(*boxes, strict=True))
    sizes = [stop - start for start, stop in boxes[0]]
    counts = tuple((stop - start) // size for (start, stop), size in zip(whole, sizes, strict=True))
    places = [
        tuple(divmod(start - corner, size) for (start, _), (corner, _), size in zip(box, whole, sizes, strict=True))
        for box in boxes
    ]
    expected = [tuple((place, 0) for place in row) for row in itertools.product(*map(range, counts))]
    return (whole, counts) if places == expected else None
