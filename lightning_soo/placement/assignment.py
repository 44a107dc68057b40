"""Who owns what: deterministic, longest processing time first."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


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
