"""What ranks send each other, by purpose: the bytes that :class:`lightning_soo.transport.Transport` counts."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from lightning_soo.linalg.banded import halo
from lightning_soo.optim import grafting
from lightning_soo.optim.contributions import COUNTS
from lightning_soo.optim.kfac_options import KFACOptions
from lightning_soo.optim.options import SONewOptions
from lightning_soo.optim.outcomes import array_templates, message_size
from lightning_soo.optim.planned import PlannedOptimizer
from lightning_soo.optim.refreshing import make_schedule
from lightning_soo.optim.runs import band_names
from lightning_soo.placement.chains import Halos
from lightning_soo.placement.exchange import Bucket
from lightning_soo.placement.plan import Plan, PlannedParameter, Unit
from lightning_soo.transport import template_size

Bytes = npt.NDArray[np.int64]
# when a flow is sent, from the first roots on
STEP, STATISTICS, INTERVAL = "step", "statistics", "interval"
ALL_REDUCE, ALL_TO_ALL, BROADCAST = "all_reduce", "all_to_all", "broadcast"
_SCALAR = 8  # flags and sums of squares travel in float64


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What one purpose sends.

    Attributes:
        purpose: as errors and :attr:`Transport.sent` call it.
        axis: ``"shard"``, ``"replicate"``, or ``"all"`` where one collective is over both.
        when: in every ``"step"``, in steps that update ``"statistics"``, or once in a refresh ``"interval"``.
        bytes: of each rank.
        collectives: how many; none where it makes another one longer.
        kind: of collective.
        arriving: bytes that reach every rank, where that is more than any sends: broadcasts of several.
    """

    purpose: str
    axis: str
    when: str
    bytes: Bytes
    collectives: int
    kind: str = ALL_TO_ALL
    arriving: int = 0


def flows(optimizer: PlannedOptimizer, plan: Plan, without_gradient: Collection[str] = ()) -> list[Flow]:
    """Everything that is sent once all roots are in.

    Args:
        optimizer: whose method and options count; its parameters may be on the meta device.
        without_gradient: names of trainable parameters that never get one: nothing of them is sent.
    """
    if plan.ranks == 1:
        return []
    counted = Counting(optimizer, plan, without_gradient)
    sums = [*counted.flags(), *counted.norms(), *counted.rows(), *counted.signal()]
    parts = [*counted.cut_blocks(), *counted.chains(), *counted.factors()]
    found = [*sums, *parts, *counted.roots(), *counted.statistics()]
    return [flow for flow in found if flow.collectives or flow.bytes.any()]


def collectives_per_step(found: Sequence[Flow]) -> dict[str, int]:
    """By kind, those of a step that updates statistics and neither starts nor takes roots."""
    counts = dict.fromkeys((ALL_REDUCE, ALL_TO_ALL), 0)
    for flow in found:
        if flow.when != INTERVAL:
            counts[flow.kind] += flow.collectives
    return counts


class Counting:
    """One plan's traffic; each method is one purpose."""

    def __init__(self, optimizer: PlannedOptimizer, plan: Plan, without_gradient: Collection[str]) -> None:
        self._optimizer, self._options, self._plan = optimizer, optimizer.options, plan
        self._still = set(without_gradient)
        self._zeros = np.zeros(plan.ranks, dtype=np.int64)
        self._shard = np.asarray(plan.table.shard)
        self._parameters = {parameter.name: parameter for parameter in plan.parameters}
        self._messages: dict[object, tuple[int, int]] = {}
        copies = plan.ranks // plan.table.shards
        self._all = "replicate" if plan.table.shards == 1 else "shard" if copies == 1 else "all"
        self._parts: dict[int, list[PlannedParameter]] = {}
        for parameter in plan.parameters:
            if parameter.name not in self._still and parameter.spec.requires_grad:
                self._parts.setdefault(parameter.spec.part, []).append(parameter)

    def flags(self) -> Iterator[Flow]:
        """The largest magnitude of every parameter, and whether one is sparse; under K-FAC who saw which layer."""
        yield self._reduction("the flags", len(self._plan.parameters) + 1)
        if self._plan.adds_up:
            layers = self._optimizer._layers()
            assert layers is not None
            yield self._reduction("the flags", len(layers.specs), STATISTICS, collectives=0)

    def norms(self) -> Iterator[Flow]:
        """Sums of squares of grafts and directions, part by part, where parameters are sharded."""
        if self._plan.table.shards == 1:
            return
        options = self._options
        for members in self._parts.values():
            if grafting.normalizes(options.grafting):
                yield self._reduction("the norms", len(members))
            covered = [parameter for parameter in members if parameter.is_preconditioned]
            if isinstance(options, KFACOptions) and options.grafting is None:
                if options.kl_clip is not None or options.adaptive_damping is not None:
                    yield self._reduction("the norms", 2)
            elif covered and (options.chain is not None or options.grafting is not None):
                by_block = options.grafting_norm == "block" and options.chain is None
                count = sum(len(parameter.units) for parameter in covered) if by_block else len(covered)
                yield self._reduction("the norms", 2 * count)

    def signal(self) -> Iterator[Flow]:
        """What gradients have in common with their running means, part by part, where an exponent depends on it."""
        if self._plan.table.shards == 1 or not self._optimizer.watches_signal:
            return
        for members in self._parts.values():
            count = sum(any(self._options.exponent(unit.block) is None for unit in one.units) for one in members)
            if count:
                yield self._reduction("the gradients' signal", 2 * count, STATISTICS)

    def rows(self) -> Iterator[Flow]:
        """Second moments of the rows that sharding cuts, part by part, where rows have a diagonal preconditioner."""
        numbers = {parameter.name: index for index, parameter in enumerate(self._plan.parameters)}
        for members in self._parts.values():
            count = 0
            for one in members:
                blocks = [unit.block for unit in one.units]
                if blocks and self._options.has_diagonal_rows(blocks[0]):
                    columns = math.prod(blocks[0].merged_shape[1:])
                    count += len(self._plan.table.cut_rows(numbers[one.name], columns))
            if count:
                yield self._reduction("the rows that sharding cuts", count)

    def cut_blocks(self) -> Iterator[Flow]:
        """Gradients of cut blocks to their homes, for statistics and for directions, and directions back."""
        used = [b for found in self._plan.buckets.values() for b in found if not self._stands_still(b)]
        # homes give back what they got
        there, back = (found[self._shard] for found in self._plan.bytes_away(used))
        count, purpose = len(used), "the gradients of cut blocks"
        if not self._plan.adds_up:
            yield Flow(purpose=purpose, axis="shard", when=STATISTICS, bytes=there, collectives=count)
        times = self._plan.exchanges
        yield Flow(purpose=purpose, axis="shard", when=STEP, bytes=times * there, collectives=times * count)
        yield Flow(purpose="the directions of cut blocks", axis="shard", when=STEP, bytes=back, collectives=count)

    def chains(self) -> Iterator[Flow]:
        """Neighbours where sharding cuts a chain (SONew)."""
        options, plan = self._options, self._plan
        if not isinstance(options, SONewOptions):
            return
        lengths = [parameter.chain for parameter in plan.parameters]
        rows = len(band_names(options.bandwidth)) + 2
        for part, members in self._parts.items():
            own = [index for index, parameter in enumerate(plan.parameters) if parameter.spec.part == part]
            halos = Halos.plan(plan.table, lengths, own, halo(options.bandwidth))
            if halos.is_empty:
                continue
            width = max(options.statistics_dtype(parameter.spec.dtype).itemsize for parameter in members)
            sent = [
                sum(strip.stop - strip.start for to, strips in enumerate(row) if to != place for strip in strips)
                for place, row in enumerate(halos.strips)
            ]
            bytes_ = np.array(sent, dtype=np.int64)[self._shard] * rows * width
            yield Flow(purpose="the neighbours at cuts", axis="shard", when=STEP, bytes=bytes_, collectives=1)
            if options.relative_eps:
                yield self._reduction("the largest diagonals of cut chains", len(halos.cut))

    def factors(self) -> Iterator[Flow]:
        """K-FAC's statistics of every rank to the ranks that keep them."""
        if not self._plan.adds_up:
            return
        for part in {parameter.spec.part for parameter in self._plan.parameters}:
            units = [unit for unit in self._moving() if self._part_of(unit) == part]
            sizes = {unit.key: self._factor_elements(unit) for unit in units}
            width = max((self._statistics_dtype(unit).itemsize for unit in units), default=0)
            sent = np.full(self._plan.ranks, sum(sizes.values()), dtype=np.int64)
            for unit in units:
                sent[unit.place.keeper] -= sizes[unit.key]
            yield Flow(
                purpose="the factors", axis=self._all, when=STATISTICS, bytes=sent * width, collectives=int(bool(units))
            )

    def roots(self) -> Iterator[Flow]:
        """From their refreshers to the ranks that apply them; a header to every other rank."""
        plan, units = self._plan, self._moving()
        collectives = self._refresh_slots(units)
        if plan.is_replicated:
            sent = self._zeros.copy()
            for unit in units:
                sent[unit.refresher] += self._message(unit)[0]
            # one broadcast for every rank that has a root in flight
            owners = min(len({unit.refresher for unit in units}), -(-len(units) // max(collectives, 1)))
            yield Flow(
                purpose="the roots",
                axis="replicate",
                when=INTERVAL,
                bytes=sent,
                collectives=collectives * owners,
                kind=BROADCAST,
                arriving=int(sent.sum()),
            )
            return
        near, far = self._zeros.copy(), self._zeros.copy()
        replica = np.asarray(plan.table.replica)
        headers = np.bincount(replica)
        at_homes: dict[tuple[int, ...], Bytes] = {}
        for unit in units:
            if unit.homes not in at_homes:
                at_homes[unit.homes] = np.bincount(replica[list(unit.homes)], minlength=len(headers))
            whole, header = self._message(unit)
            owner, own = unit.refresher, replica[unit.refresher]
            here = unit.refresher in unit.homes
            homes_near = int(at_homes[unit.homes][own]) - here
            homes_far = len(unit.homes) - homes_near - here
            near[owner] += homes_near * whole + (int(headers[own]) - 1 - homes_near) * header
            far[owner] += homes_far * whole + (plan.ranks - int(headers[own]) - homes_far) * header
        yield self._per_interval("the roots", "shard", near, collectives)
        yield self._per_interval("the roots", "replicate", far, 0 if not far.any() else collectives)

    def statistics(self) -> Iterator[Flow]:
        """From their keepers to refreshers that are not at home, before each refresh."""
        replica = self._plan.table.replica
        near, far = self._zeros.copy(), self._zeros.copy()
        away = [unit for unit in self._moving() if unit.place.keeper != unit.refresher]
        for unit in away:
            layouts = self._optimizer.block_class.statistics_layouts(unit.block)
            size = template_size([((2,), torch.float64), *array_templates(layouts, self._statistics_dtype(unit))])
            keeper = unit.place.keeper
            (near if replica[keeper] == replica[unit.refresher] else far)[keeper] += size
        slots = self._refresh_slots(away)
        yield self._per_interval("the statistics", "shard", near, slots if near.any() else 0)
        yield self._per_interval("the statistics", "replicate", far, slots if far.any() else 0)

    def _reduction(self, purpose: str, count: int, when: str = STEP, collectives: int = 1) -> Flow:
        """A vector of float64 that all ranks reduce; without a collective of its own it makes another one longer."""
        return Flow(
            purpose=purpose,
            axis=self._all,
            when=when,
            bytes=self._zeros + _SCALAR * count,
            collectives=collectives,
            kind=ALL_REDUCE,
        )

    def _per_interval(self, purpose: str, axis: str, sent: Bytes, collectives: int) -> Flow:
        return Flow(purpose=purpose, axis=axis, when=INTERVAL, bytes=sent, collectives=collectives)

    def _stands_still(self, bucket: Bucket) -> bool:
        return all(self._plan.parameters[traveller.parameter].name in self._still for traveller in bucket.travellers)

    def _moving(self) -> list[Unit]:
        return [unit for unit in self._plan.units if unit.block.parameter not in self._still]

    def _part_of(self, unit: Unit) -> int:
        return self._parameters[unit.block.parameter].spec.part

    def _statistics_dtype(self, unit: Unit) -> torch.dtype:
        return self._options.statistics_dtype(self._parameters[unit.block.parameter].spec.dtype)

    def _message(self, unit: Unit) -> tuple[int, int]:
        """Bytes of an outcome with its roots, and without."""
        layouts = self._optimizer.block_class.root_layouts(unit.block)
        dtype = self._optimizer.root_dtype(self._parameters[unit.block.parameter].spec.dtype, unit.block)
        if (layouts, dtype) not in self._messages:
            sizes = message_size(layouts, dtype), message_size(layouts, dtype, with_roots=False)
            self._messages[layouts, dtype] = sizes
        return self._messages[layouts, dtype]

    def _factor_elements(self, unit: Unit) -> int:
        layouts = self._optimizer.block_class.statistics_layouts(unit.block)
        templates = array_templates(layouts, self._statistics_dtype(unit))
        return COUNTS + sum(math.prod(shape) for shape, _ in templates)

    @cached_property
    def _offsets(self) -> dict[str, int]:
        return make_schedule(self._options, self._plan).offsets

    def _refresh_slots(self, units: Collection[Unit]) -> int:
        """How often in an interval some of these are refreshed: blocks of one step and one part go together."""
        return len({(self._part_of(unit), self._offsets.get(unit.key, 0)) for unit in units})
