"""Who owns what: deterministic, longest processing time first, and how good that can be."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# what a largest load may be, in multiples of the least one that is possible: room to keep items where they are wanted
TOLERANCE = 1.05
# sums of costs that are looked at for the bound; where there are more, loads can be nearly anything
_MOST_SUMS = 4096
_MOST_UNITS = 128

Loads = npt.NDArray[np.float64]


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


def smallest_largest_load(costs: Sequence[float], bins: int, loads: Sequence[float] | None = None) -> float:
    """A lower bound on the largest load of any assignment.

    The largest of: the mean load; the costliest item; for every ``k`` the ``k + 1`` smallest of the ``k bins + 1``
    costliest items, of which some bin has ``k + 1``; the smallest sum of costs that reaches the mean, since every load
    is a sum of costs; and for the cost ``u`` of every item the mean in whole units of ``u``, when all costs are rounded
    down to such units. From bins that carry something already, the mean and the largest of them alone.
    """
    if loads is not None and any(loads):
        return max((sum(loads) + sum(costs)) / bins, *loads)
    ordered = sorted(costs, reverse=True)
    if not ordered or not ordered[0] > 0:
        return 0.0
    mean = sum(ordered) / bins
    found = max(mean, ordered[0])
    for k in range(1, (len(ordered) - 1) // bins + 1):
        found = max(found, sum(ordered[k * bins - k : k * bins + 1]))
    return max(found, _reachable(ordered, mean), _in_units(Counter(ordered), bins))


def assign_near(
    costs: Sequence[float],
    preferred: Sequence[Sequence[int]],
    bins: int,
    loads: Sequence[float] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> list[int]:
    """As :func:`assign`, but an item stays with a bin it prefers while that bin is not overloaded.

    Longest item first: to its least loaded preferred bin where the load stays below ``tolerance`` times the least
    possible largest load (or where that bin is the least loaded of all), else to the least loaded bin. Where bins are
    overloaded in the end, items move out of them.

    Args:
        preferred: for each item the bins where it costs nothing to be.
        tolerance: infinite where an item may not be elsewhere.
    """
    limit = tolerance * smallest_largest_load(costs, bins, loads)
    current = np.zeros(bins) if loads is None else np.array(loads, dtype=np.float64)
    choices = _arrays(preferred)
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        near = choices[item]
        owner = int(near[np.argmin(current[near])]) if near.size else int(np.argmin(current))
        if near.size and current[owner] + costs[item] > limit:
            lightest = int(np.argmin(current))
            owner = lightest if current[lightest] < current[owner] else owner
        owners[item] = owner
        current[owner] += costs[item]
    if math.isinf(limit):
        return owners
    return _relieved(costs, owners, bins, loads, limit)


def assign_both(costs: Sequence[float], others: Sequence[float], bins: int, loads: Sequence[float] | None) -> list[int]:
    """Give each item a bin so that the largest load is small, and with what room that leaves, another load as well.

    Longest item first, to the bin with the smallest other load among those that stay below 1.05 times the least
    possible largest load.

    Args:
        costs: what decides.
        others: of each item in the other measure.
        loads: what the bins already carry of the first.
    """
    limit = TOLERANCE * smallest_largest_load(costs, bins, loads)
    current = np.zeros(bins) if loads is None else np.array(loads, dtype=np.float64)
    other = np.zeros(bins)
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], -others[item], item)):
        open_to = np.flatnonzero(current + costs[item] <= limit)
        if open_to.size:
            least = open_to[other[open_to] == other[open_to].min()]
            owner = int(least[np.argmin(current[least])])
        else:
            owner = int(np.argmin(current))
        owners[item] = owner
        current[owner] += costs[item]
        other[owner] += others[item]
    return _relieved(costs, owners, bins, loads, limit)


def _relieved(
    costs: Sequence[float], owners: list[int], bins: int, loads: Sequence[float] | None, limit: float
) -> list[int]:
    """Move or exchange items out of bins above ``limit``; plain :func:`assign` where that is better in the end."""
    current = _summed(costs, owners, bins, loads)
    if current.max(initial=0.0) <= limit:
        return owners
    moved = list(owners)
    inside: list[list[int]] = [[] for _ in range(bins)]
    for item, owner in enumerate(moved):
        inside[owner].append(item)
    for _ in costs:
        heaviest, lightest = int(np.argmax(current)), int(np.argmin(current))
        excess, room = current[heaviest] - limit, limit - current[lightest]
        if excess <= 0:
            return moved
        fitting = [item for item in inside[heaviest] if 0 < costs[item] <= room]
        back: list[int] = []
        enough = [item for item in fitting if costs[item] >= excess]
        if enough or fitting:
            out = min(enough, key=lambda item: (costs[item], item)) if enough else max(fitting, key=lambda i: costs[i])
        else:
            pairs = [
                (costs[mine] - costs[theirs], mine, theirs)
                for mine in _one_of_each(costs, inside[heaviest])
                for theirs in _one_of_each(costs, inside[lightest])
                if 0 < costs[mine] - costs[theirs] <= room
            ]
            if not pairs:
                break
            _, out, other = max(pairs, key=lambda pair: (min(pair[0], excess), -pair[1], -pair[2]))
            back = [other]
        for item, source, target in ((out, heaviest, lightest), *((one, lightest, heaviest) for one in back)):
            inside[source].remove(item)
            inside[target].append(item)
            current[source] -= costs[item]
            current[target] += costs[item]
            moved[item] = target
    plain = assign(costs, bins, loads)
    return min((moved, plain), key=lambda found: float(_summed(costs, found, bins, loads).max()))


def _one_of_each(costs: Sequence[float], items: Sequence[int]) -> list[int]:
    """The first item of every cost."""
    return list({costs[item]: item for item in reversed(items)}.values())


def _summed(costs: Sequence[float], owners: Sequence[int], bins: int, loads: Sequence[float] | None) -> Loads:
    found = np.zeros(bins) if loads is None else np.array(loads, dtype=np.float64)
    np.add.at(found, np.asarray(owners, dtype=np.int64), np.asarray(costs, dtype=np.float64))
    return found


def _arrays(preferred: Sequence[Sequence[int]]) -> list[npt.NDArray[np.int64]]:
    """Lists that are the same object, as homes of the blocks of one place are, are converted once."""
    known: dict[int, npt.NDArray[np.int64]] = {}
    for bins in preferred:
        if id(bins) not in known:
            known[id(bins)] = np.array(sorted(bins), dtype=np.int64)
    return [known[id(bins)] for bins in preferred]


def _in_units(numbers: Counter[float], bins: int) -> float:
    """Of costs, by how many items have them; where there are many different ones the units say nothing."""
    if len(numbers) > _MOST_UNITS:
        return 0.0
    units = [unit for unit in numbers if unit > 0]
    return max(
        unit * math.ceil(sum(number * math.floor(cost / unit + 1e-9) for cost, number in numbers.items()) / bins)
        for unit in units
    ) * (1.0 - 1e-9)  # as much as a quotient may have been rounded up


def _reachable(ordered: Sequence[float], mean: float) -> float:
    """The smallest sum of costs that is at least ``mean``; ``mean`` where there are too many sums to look at."""
    sums = {0.0}
    best = math.inf
    for cost, number in Counter(ordered).items():  # from the largest down
        count = min(number, math.ceil(mean / cost)) if cost > 0 else 0
        if len(sums) * (count + 1) > 8 * _MOST_SUMS:
            return mean
        grown = set()
        for start in sums:
            for times in range(count + 1):
                total = start + times * cost
                if total >= mean * (1.0 - 1e-12):
                    best = min(best, total)
                    break
                grown.add(total)
        sums = grown
        if len(sums) > _MOST_SUMS:
            return mean
    return max(mean, best) if best < math.inf else mean
