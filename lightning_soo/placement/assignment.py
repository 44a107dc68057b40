"""Who owns what: deterministic, longest processing time first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

# a preferred place is taken as long as its load stays below this multiple of the mean
_NEAR_ENOUGH = 1.1


def assign(costs: Sequence[float], bins: int, loads: Sequence[float] | None = None) -> list[int]:
    """Give each item a bin so that the largest load is small.

    Longest item first, each to the least loaded bin (the lowest number where loads are equal), so the result is the
    same on every rank. From empty bins the largest load is at most ``4/3 - 1/(3 bins)`` times the best possible one
    (Graham 1969).

    Args:
        costs: cost of each item, at least zero.
        bins: how many bins.
        loads: what the bins already carry.
    """
    if bins < 1:
        raise ValueError(f"bins={bins}: at least one is needed")
    heap = [(0.0 if loads is None else loads[index], index) for index in range(bins)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, index = heapq.heappop(heap)
        owners[item] = index
        heapq.heappush(heap, (load + costs[item], index))
    return owners


def assign_near(
    costs: Sequence[float],
    preferred: Sequence[Sequence[int]],
    bins: int,
    loads: Sequence[float] | None = None,
    *,
    near_enough: float = _NEAR_ENOUGH,
) -> list[int]:
    """As :func:`assign`, but an item stays with a bin it prefers while that bin is not overloaded.

    Longest item first: to its least loaded preferred bin where the load stays below 1.1 times the mean (or where that
    bin is the least loaded of all), else to the least loaded bin.

    Args:
        preferred: for each item the bins where it costs nothing to be.
        near_enough: in place of 1.1; infinite where an item may not be elsewhere.
    """
    current = [0.0] * bins if loads is None else list(loads)
    limit = near_enough * (sum(current) + sum(costs)) / bins
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        near = min(preferred[item], key=lambda index: (current[index], index), default=None)
        lightest = min(range(bins), key=lambda index: (current[index], index)) if near is None else None
        if near is not None and current[near] + costs[item] > limit:
            lightest = min(range(bins), key=lambda index: (current[index], index))
            if current[lightest] < current[near]:
                near = lightest
        owner = near if near is not None else lightest
        assert owner is not None
        owners[item] = owner
        current[owner] += costs[item]
    return owners
