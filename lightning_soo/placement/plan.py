"""The plan: every parameter's blocks, where each lives, what it costs. A pure function; the same on every rank."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_soo.placement.blocks import Block, BlockRules, partition
from lightning_soo.placement.chains import chain_length
from lightning_soo.placement.exchange import Bucket, Traveller, fill_buckets, travel_parts
from lightning_soo.placement.homes import Place, place_blocks
from lightning_soo.placement.layout import FragmentTable
from lightning_soo.placement.overrides import Override, ParameterSpec, resolve


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is owned as one: a block, and its place.

    Attributes:
        root_bytes, statistics_bytes, moment_bytes: of one copy of its roots, of its statistics, and of moments that are
            kept where it is applied.
    """

    block: Block
    place: Place
    root_bytes: int
    statistics_bytes: int
    moment_bytes: int

    @property
    def key(self) -> str:
        return self.block.key

    @property
    def refresher(self) -> int:
        return self.place.refresher

    @property
    def homes(self) -> tuple[int, ...]:
        return self.place.homes


@dataclass(frozen=True, kw_only=True)
class PlannedParameter:
    """One row of the plan; ``reason`` says why it is not preconditioned.

    Attributes:
        chain: length of its chains, for methods that have bands in place of units.
    """

    spec: ParameterSpec
    units: tuple[Unit, ...]
    reason: str
    chain: int | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_preconditioned(self) -> bool:
        return bool(self.units) or self.chain is not None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was decided before the first step.

    Attributes:
        buckets: part of the step -> what travels in it, in order.
        exchanges: buffers of each bucket on the way to the homes: the filtered gradient, and the gradient where the
            method wants both.
    """

    parameters: tuple[PlannedParameter, ...]
    table: FragmentTable
    buckets: Mapping[int, tuple[Bucket, ...]]
    exchanges: int = 1

    @property
    def ranks(self) -> int:
        return self.table.ranks

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        return tuple(unit for parameter in self.parameters for unit in parameter.units)

    @property
    def is_replicated(self) -> bool:
        """Whether every rank is a home of every unit: one device, DDP."""
        return all(len(unit.homes) == self.ranks for unit in self.units)

    @property
    def loads(self) -> list[float]:
        """Milliseconds per step that each rank spends for the units it refreshes."""
        loads = [0.0] * self.ranks
        for unit in self.units:
            loads[unit.refresher] += unit.place.milliseconds
        return loads

    @property
    def balance(self) -> float:
        """Largest load over the mean load: 1 is perfect."""
        return _largest_over_mean(self.loads)

    @property
    def state_bytes(self) -> list[int]:
        """Preconditioner state of each rank: roots where they are applied, statistics where they are kept."""
        count = [0] * self.ranks
        for unit in self.units:
            for home in unit.homes:
                count[home] += unit.root_bytes + unit.moment_bytes
            count[unit.place.keeper] += unit.statistics_bytes
        return count

    @property
    def state_balance(self) -> float:
        """Largest state of a rank over the mean state."""
        return _largest_over_mean(self.state_bytes)

    @property
    def exchange_bytes(self) -> int:
        """The most that any rank sends or receives of gradients, one way, per step."""
        sent, received = [0] * self.table.shards, [0] * self.table.shards
        for bucket in self._all_buckets:
            for place in range(self.table.shards):
                away = [count for home, count in enumerate(bucket.sent(place)) if home != place]
                sent[place] += sum(away) * bucket.dtype.itemsize
                come = [count for source, count in enumerate(bucket.received(place)) if source != place]
                received[place] += sum(come) * bucket.dtype.itemsize
        return max([0, *sent, *received])

    @property
    def buffer_bytes(self) -> int:
        """The most that exchange buffers occupy on a rank: two buckets under way, each with its way back."""
        largest = sorted((bucket.largest_bytes for bucket in self._all_buckets), reverse=True)[:2]
        return 2 * (self.exchanges + 1) * sum(largest)

    def collectives_per_step(self, *, observes: bool, grafts: bool) -> dict[str, int]:
        """Collectives of a step between refreshes, once roots are in: two small reductions, and travelling blocks.

        Args:
            observes: whether statistics see the gradient in this step.
            grafts: whether directions get the size of a graft, which takes their norms.
        """
        parts = len({p.spec.part for p in self.parameters if p.is_preconditioned})
        if self.ranks == 1:
            return {"all_reduce": 0, "all_to_all": 0}
        return {
            "all_reduce": 1 + (parts if grafts and self.table.shards > 1 else 0),
            "all_to_all": len(self._all_buckets) * (self.exchanges + 1 + observes),
        }

    @property
    def preconditioned_share(self) -> float:
        """Elements of preconditioned parameters over all trainable elements."""
        total = sum(math.prod(p.spec.shape) for p in self.parameters if p.spec.requires_grad)
        covered = sum(math.prod(p.spec.shape) for p in self.parameters if p.is_preconditioned)
        return covered / total if total else 0.0

    @property
    def _all_buckets(self) -> list[Bucket]:
        return [bucket for buckets in self.buckets.values() for bucket in buckets]

    def digest(self) -> str:
        """Hash of everything that must be the same on every rank."""
        rows = [
            [
                *(p.name, list(p.spec.shape), str(p.spec.dtype), p.spec.part, p.reason, p.chain),
                [[u.key, u.refresher, list(u.homes), u.place.travels, list(u.block.dims)] for u in p.units],
            ]
            for p in self.parameters
        ]
        buckets = [[part, [[t.key for t in b.travellers] for b in found]] for part, found in self.buckets.items()]
        return hashlib.sha256(json.dumps([self.table.digest_rows(), rows, buckets]).encode()).hexdigest()


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
    element_bytes: Callable[[ParameterSpec], tuple[int, int, int]] = lambda spec: (spec.dtype.itemsize, 4, 0),
    exchanges: int = 1,
    chain: str | None = None,
    previous: Mapping[str, Place] | None = None,
    refresh_at_home: bool = False,
) -> Plan:
    """Cut parameters into blocks and give each a place.

    Args:
        table: what every rank holds; None is everything on each of ``ranks``.
        element_bytes: size of an element of a parameter's roots, of its statistics and of its moments.
        chain: bands along chains in place of blocks, see :class:`lightning_soo.SONew`.
        previous: block key -> place in the plan before; blocks that are still there stay where they are, so that
            nothing moves when a parameter group is added.
    """
    table = table or FragmentTable.whole([math.prod(spec.shape) for spec in specs], ranks)
    cut: list[tuple[ParameterSpec, list[Block], str]] = []
    for spec, (method, own) in zip(specs, resolve(specs, rules, overrides), strict=True):
        blocks: list[Block] = []
        if not spec.requires_grad:
            reason = "frozen"
        elif method == "none":
            reason = "override: none"
        elif chain is not None:
            reason = "one element" if math.prod(spec.shape) == 1 else "empty" if 0 in spec.shape else ""
        else:
            blocks, reason = partition(spec.name, spec.shape, own)
        cut.append((spec, blocks, reason))
    places = place_blocks(
        [(parameter, block) for parameter, (_, blocks, _) in enumerate(cut) for block in blocks],
        table,
        precondition_frequency=precondition_frequency,
        statistics_frequency=statistics_frequency,
        previous=previous or {},
        refresh_at_home=refresh_at_home,
    )
    parameters = []
    for spec, blocks, reason in cut:
        root_size, statistics_size, moment_size = element_bytes(spec)
        units = []
        for block in blocks:
            elements = sum(order**2 for order in block.orders)
            units.append(
                Unit(
                    block=block,
                    place=places[block.key],
                    root_bytes=elements * root_size,
                    statistics_bytes=elements * statistics_size,
                    moment_bytes=math.prod(block.shape) * moment_size,
                )
            )
        length = chain_length(spec.shape, chain) if chain is not None and not reason else None
        parameters.append(PlannedParameter(spec=spec, units=tuple(units), reason=reason, chain=length))
    travellers: dict[int, list[Traveller]] = {}
    number = 0
    copy = table.copy_of(0)
    for index, parameter in enumerate(parameters):
        ranges = [table.ranges[rank][index] for rank in copy]
        for unit in parameter.units:
            if unit.place.travels:
                travellers.setdefault(parameter.spec.part, []).append(
                    Traveller(
                        unit=number,
                        key=unit.key,
                        parameter=index,
                        home=table.shard[unit.homes[0]],
                        dtype=parameter.spec.dtype,
                        parts=travel_parts(unit.block.merged_shape, unit.block.ranges, ranges),
                    )
                )
            number += 1
    buckets = {
        part: tuple(fill_buckets(found, table.shards, exchange_bucket_bytes)) for part, found in travellers.items()
    }
    return Plan(parameters=tuple(parameters), table=table, buckets=buckets, exchanges=exchanges)


def _largest_over_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean > 0 else 1.0
