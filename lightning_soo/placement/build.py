"""Make a plan: cut parameters into blocks, give each a place, pack what travels. Pure functions of names and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning_soo.placement.blocks import Block, BlockRules, partition
from lightning_soo.placement.chains import chain_length
from lightning_soo.placement.exchange import Traveller, fill_buckets
from lightning_soo.placement.holders import Holders, holders_of
from lightning_soo.placement.homes import Place, place_blocks
from lightning_soo.placement.layers import LayerBlock, Layers, cut_layers
from lightning_soo.placement.layout import FragmentTable
from lightning_soo.placement.overrides import Override, ParameterSpec, resolve
from lightning_soo.placement.plan import Plan, PlannedParameter, Unit

# block key -> index of another parameter and its block that goes with it: a bias
Companions = Mapping[str, tuple[int, Block]]


def build_plan(
    specs: Sequence[ParameterSpec],
    rules: BlockRules,
    *,
    overrides: Sequence[Override] = (),
    ranks: int = 1,
    table: FragmentTable | None = None,
    precondition_frequency: int = 20,
    statistics_frequency: int = 1,
    exchange_bucket_bytes: int = 2**25,
    state_bytes: Callable[[ParameterSpec, Block], tuple[int, int, int]] = lambda spec, block: (0, 0, 0),
    exchanges: int = 1,
    chain: str | None = None,
    layers: Layers | None = None,
    groups: Sequence[int] | None = None,
    previous: Mapping[str, Place] | None = None,
    refresh_at_home: bool = False,
) -> Plan:
    """Cut parameters into blocks and give each a place.

    Args:
        table: what every rank holds; None is everything on each of ``ranks``.
        state_bytes: of a block's roots, of its statistics and of its moments.
        layers: what has factors, in place of cuts by size (K-FAC). Statistics do not come from gradients then: the
            rank that refreshes a block keeps them.
        groups: number of each parameter's group; None is one group.
        chain: bands along chains in place of blocks, see :class:`lightning_soo.SONew`.
        previous: block key -> place in the plan before; blocks that are still there stay where they are, so that
            nothing moves when a parameter group is added.
    """
    table = table or FragmentTable.whole([math.prod(spec.shape) for spec in specs], ranks)
    cuts = _cut(specs, rules, overrides, layers, groups, chain)
    index_of = {spec.name: index for index, spec in enumerate(specs)}
    companions: Companions = {
        block.key: (index_of[block.bias.parameter], block.bias)
        for cut in cuts
        for block in cut.blocks
        if isinstance(block, LayerBlock) and block.bias is not None
    }
    holders = holders_of(table)
    places = place_blocks(
        [(index, block) for index, cut in enumerate(cuts) for block in cut.blocks],
        table,
        companions=companions,
        keep_at_refresher=layers is not None,
        precondition_frequency=precondition_frequency,
        statistics_frequency=statistics_frequency,
        previous=previous or {},
        refresh_at_home=refresh_at_home,
        holders=holders,
    )
    parameters = tuple(
        PlannedParameter(
            spec=spec,
            units=tuple(_unit(block, places[block.key], state_bytes(spec, block)) for block in cut.blocks),
            reason=cut.reason,
            chain=chain_length(spec.shape, chain) if chain is not None and not cut.reason else None,
            joined=cut.joined,
            note=cut.note,
        )
        for spec, cut in zip(specs, cuts, strict=True)
    )
    travellers: dict[int, list[Traveller]] = {}
    for part, traveller in _travellers(parameters, table, holders, companions):
        travellers.setdefault(part, []).append(traveller)
    buckets = {
        part: tuple(fill_buckets(found, table.shards, exchange_bucket_bytes)) for part, found in travellers.items()
    }
    return Plan(parameters=parameters, table=table, buckets=buckets, exchanges=exchanges, adds_up=layers is not None)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One parameter's blocks, or why it has none; the rest as in :class:`PlannedParameter`."""

    blocks: Sequence[Block] = ()
    reason: str = ""
    joined: tuple[str, ...] = ()
    note: str = ""


def _cut(
    specs: Sequence[ParameterSpec],
    rules: BlockRules,
    overrides: Sequence[Override],
    layers: Layers | None,
    groups: Sequence[int] | None,
    chain: str | None,
) -> list[_Cut]:
    resolved = resolve(specs, rules, overrides)
    excluded = {
        spec.name: "override: none" if spec.requires_grad else "frozen"
        for spec, (method, _) in zip(specs, resolved, strict=True)
        if method == "none" or not spec.requires_grad
    }
    found = None
    if layers is not None:
        together = {
            spec.name: (group, spec.part) for spec, group in zip(specs, groups or [0] * len(specs), strict=True)
        }
        found = cut_layers(specs, layers, together, excluded)
    cuts = []
    for spec, (_, own) in zip(specs, resolved, strict=True):
        blocks: Sequence[Block] = []
        reason = excluded.get(spec.name, "")
        if reason:
            pass
        elif chain is not None:
            reason = "one element" if math.prod(spec.shape) == 1 else "empty" if 0 in spec.shape else ""
        elif found is not None:
            blocks, reason = found.blocks.get(spec.name, []), found.reasons.get(spec.name, "")
        else:
            blocks, reason = partition(spec.name, spec.shape, own)
        joined = tuple(found.joined.get(spec.name, ())) if found is not None else ()
        note = found.notes.get(spec.name, "") if found is not None else ""
        cuts.append(_Cut(blocks=blocks, reason=reason, joined=joined, note=note))
    return cuts


def _unit(block: Block, place: Place, state_bytes: tuple[int, int, int]) -> Unit:
    roots, statistics, moments = state_bytes
    return Unit(block=block, place=place, root_bytes=roots, statistics_bytes=statistics, moment_bytes=moments)


def _travellers(
    parameters: Sequence[PlannedParameter], table: FragmentTable, holders: Sequence[Holders], companions: Companions
) -> Iterator[tuple[int, Traveller]]:
    """What travels, with the part of the step it belongs to; a block's companion goes where the block goes."""
    number = 0

    def traveller(index: int, block: Block, unit: Unit, companion: Traveller | None = None) -> Traveller:
        return Traveller(
            unit=number,
            key=block.key,
            parameter=index,
            box=block.ranges,
            home=table.shard[unit.homes[0]],
            dtype=parameters[index].spec.dtype,
            parts=holders[index].parts(block.merged_shape, block.ranges),
            companion=companion,
        )

    for index, parameter in enumerate(parameters):
        for unit in parameter.units:
            if unit.place.travels:
                with_it = companions.get(unit.key)
                companion = traveller(*with_it, unit) if with_it is not None else None
                yield parameter.spec.part, traveller(index, unit.block, unit, companion)
            number += 1
