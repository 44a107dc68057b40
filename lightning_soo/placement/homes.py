"""Which ranks apply a block, and which one computes its roots. Pure and deterministic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_soo.placement.assignment import assign, assign_both, assign_near
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.costs import (
    home_milliseconds_per_step,
    refresh_milliseconds,
    statistics_milliseconds_per_step,
)
from lightning_soo.placement.holders import Holders, holders_of
from lightning_soo.placement.layout import FragmentTable


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one block lives.

    Attributes:
        homes: ranks that hold its roots and precondition it: one in every copy of the model, all of them where every
            rank holds the parameter.
        refresher: the rank whose workers compute its roots.
        keeps_at_refresher: whether the refresher keeps the statistics wherever the homes are: they do not come from
            assembled gradients.
        travels: whether no single rank of a copy holds all of it.
        milliseconds: what its refreshes cost per step.
        statistics_milliseconds: what its statistics cost their keeper per step, where they come from gradients.
    """

    homes: tuple[int, ...]
    refresher: int
    travels: bool
    milliseconds: float
    statistics_milliseconds: float = 0.0
    keeps_at_refresher: bool = False

    @property
    def keeper(self) -> int:
        """The rank that keeps its statistics: the refresher where that is a home, else the first home."""
        return self.refresher if self.keeps_at_refresher or self.refresher in self.homes else self.homes[0]


def place_blocks(
    blocks: Sequence[tuple[int, Block]],
    table: FragmentTable,
    *,
    precondition_frequency: int,
    statistics_frequency: int,
    previous: Mapping[str, Place],
    companions: Mapping[str, tuple[int, Block]] | None = None,
    keep_at_refresher: bool = False,
    refresh_at_home: bool = False,
    holders: Sequence[Holders] | None = None,
) -> dict[str, Place]:
    """Choose homes for locality first and refreshers for balance first.

    Args:
        blocks: ``(parameter, block)``.
        previous: places of an earlier plan, kept where the block is still there.
        companions: block key -> ``(parameter, block)`` of what has to be where it is.
        keep_at_refresher: statistics are kept by refreshers.
        refresh_at_home: a refresh needs what homes alone hold, so the refresher is one of them.
        holders: of ``table``, where they are known already.

    Returns:
        Block key -> place.
    """
    everyone = tuple(range(table.ranks))
    holders = holders or holders_of(table)
    by_place = [tuple(rank for rank in everyone if table.shard[rank] == place) for place in range(table.shards)]
    homes: dict[str, tuple[int, ...]] = {}
    travels: set[str] = set()
    undecided: list[tuple[Block, list[int]]] = []
    loads = [0.0] * table.shards
    costs: dict[str, float] = {}
    statistics: dict[str, float] = {}
    replicated: dict[int, bool] = {}
    for parameter, block in blocks:
        alike = [(parameter, block), *([companions[block.key]] if companions and block.key in companions else ())]
        for index, each in alike:
            if index not in replicated:
                replicated[index] = table.is_replicated(index, math.prod(each.merged_shape))
        if not keep_at_refresher:
            statistics[block.key] = statistics_milliseconds_per_step(block, statistics_frequency)
        if all(replicated[index] for index, _ in alike):
            homes[block.key] = everyone
            continue
        costs[block.key] = home_milliseconds_per_step(block) + statistics.get(block.key, 0.0)
        inside = set.intersection(
            *(set(holders[index].holding(each.merged_shape, each.ranges)) for index, each in alike)
        )
        if inside:
            homes[block.key] = by_place[min(inside)]
            loads[min(inside)] += costs[block.key]
            continue
        travels.add(block.key)
        if block.key in previous:
            homes[block.key] = previous[block.key].homes
            loads[table.shard[homes[block.key][0]]] += costs[block.key]
        else:
            held = holders[parameter].parts(block.merged_shape, block.ranges).counts
            most = max(held.values())
            undecided.append((block, [place for place, count in held.items() if count == most]))
    chosen = assign_near(
        [costs[block.key] for block, _ in undecided], [near for _, near in undecided], table.shards, loads
    )
    for (block, _), place in zip(undecided, chosen, strict=True):
        homes[block.key] = by_place[place]

    refresh = {block.key: refresh_milliseconds(block) / precondition_frequency for _, block in blocks}
    owners = {key: previous[key].refresher for key in refresh if key in previous}
    carried = [0.0] * table.ranks
    for key, owner in owners.items():
        carried[owner] += refresh[key]
    new = [key for key in refresh if key not in owners]
    values = [refresh[key] for key in new]
    if refresh_at_home:
        near = [homes[key] for key in new]
        found = assign_near(values, near, table.ranks, carried, tolerance=math.inf)
    elif keep_at_refresher:
        found = assign(values, table.ranks, carried)
    elif all(homes[key] is everyone for key in new):
        # the refresher alone keeps statistics there
        found = assign_both(values, [statistics[key] for key in new], table.ranks, carried)
    else:
        found = assign_near(values, [homes[key] for key in new], table.ranks, carried)
    owners.update(zip(new, found, strict=True))
    return {
        key: Place(
            homes=homes[key],
            refresher=owners[key],
            travels=key in travels,
            milliseconds=refresh[key],
            statistics_milliseconds=statistics.get(key, 0.0),
            keeps_at_refresher=keep_at_refresher,
        )
        for key in refresh
    }
