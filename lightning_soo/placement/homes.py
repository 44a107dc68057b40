"""Which ranks apply a block, and which one computes its roots. Pure and deterministic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_soo.placement.assignment import assign, assign_near
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.boxes import flat_span, volume
from lightning_soo.placement.costs import (
    home_milliseconds_per_step,
    refresh_milliseconds,
    statistics_milliseconds_per_step,
)
from lightning_soo.placement.exchange import travel_parts
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
        milliseconds: refresher's cost per step.
    """

    homes: tuple[int, ...]
    refresher: int
    travels: bool
    milliseconds: float
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
) -> dict[str, Place]:
    """Choose homes for locality first and refreshers for balance first.

    Args:
        blocks: ``(parameter, block)``.
        previous: places of an earlier plan, kept where the block is still there.
        companions: block key -> ``(parameter, block)`` of what has to be where it is.
        keep_at_refresher: statistics are kept by refreshers.
        refresh_at_home: a refresh needs what homes alone hold, so the refresher is one of them.

    Returns:
        Block key -> place.
    """
    everyone = tuple(range(table.ranks))
    copy = table.copy_of(0)
    by_place = [tuple(rank for rank in everyone if table.shard[rank] == place) for place in range(table.shards)]
    homes: dict[str, tuple[int, ...]] = {}
    travels: set[str] = set()
    undecided: list[tuple[Block, list[int]]] = []
    loads = [0.0] * table.shards
    costs: dict[str, float] = {}
    replicated: dict[int, bool] = {}
    for parameter, block in blocks:
        alike = [(parameter, block), *([companions[block.key]] if companions and block.key in companions else ())]
        for index, each in alike:
            if index not in replicated:
                replicated[index] = table.is_replicated(index, math.prod(each.merged_shape))
        if all(replicated[index] for index, _ in alike):
            homes[block.key] = everyone
            continue
        ranges = [table.ranges[rank][parameter] for rank in copy]
        costs[block.key] = home_milliseconds_per_step(block) + (
            0.0 if keep_at_refresher else statistics_milliseconds_per_step(block, statistics_frequency)
        )
        inside = set(range(table.shards))
        for index, each in alike:
            first, last = flat_span(each.merged_shape, each.ranges)
            inside &= {
                place
                for place, rank in enumerate(copy)
                if table.ranges[rank][index][0] <= first and last < table.ranges[rank][index][1]
            }
        if inside:
            homes[block.key] = by_place[min(inside)]
            loads[min(inside)] += costs[block.key]
            continue
        travels.add(block.key)
        if block.key in previous:
            homes[block.key] = previous[block.key].homes
            loads[table.shard[homes[block.key][0]]] += costs[block.key]
        else:
            held = [sum(map(volume, part)) for part in travel_parts(block.merged_shape, block.ranges, ranges)]
            undecided.append((block, [place for place, count in enumerate(held) if count == max(held)]))
    chosen = assign_near(
        [costs[block.key] for block, _ in undecided], [near for _, near in undecided], table.shards, loads
    )
    for (block, _), place in zip(undecided, chosen, strict=True):
        homes[block.key] = by_place[place]

    refresh = {
        block.key: refresh_milliseconds(block) / precondition_frequency
        # where every rank is a home, the refresher alone keeps statistics
        + (
            statistics_milliseconds_per_step(block, statistics_frequency)
            if replicated[parameter] and not keep_at_refresher
            else 0.0
        )
        for parameter, block in blocks
    }
    owners = {key: previous[key].refresher for key in refresh if key in previous}
    carried = [0.0] * table.ranks
    for key, owner in owners.items():
        carried[owner] += refresh[key]
    new = [key for key in refresh if key not in owners]
    values = [refresh[key] for key in new]
    if refresh_at_home:
        near = [homes[key] for key in new]
        found = assign_near(values, near, table.ranks, carried, near_enough=math.inf)
        owners.update(zip(new, found, strict=True))
    elif keep_at_refresher or all(homes[key] is everyone for key in new):
        owners.update(zip(new, assign(values, table.ranks, carried), strict=True))
    else:
        owners.update(zip(new, assign_near(values, [homes[key] for key in new], table.ranks, carried), strict=True))
    return {
        key: Place(
            homes=homes[key],
            refresher=owners[key],
            travels=key in travels,
            milliseconds=refresh[key],
            keeps_at_refresher=keep_at_refresher,
        )
        for key in refresh
    }
