"""What a plan takes on every rank: memory, flops, CPU time and bytes, and with a machine's rates seconds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lightning_soo.optim import grafting
from lightning_soo.optim.directions import TOGETHER
from lightning_soo.optim.options import SONewOptions
from lightning_soo.optim.planned import PlannedOptimizer
from lightning_soo.optim.stacking import LARGEST_STACK
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.costs import (
    apply_flops,
    apply_passes,
    refresh_flops,
    refresh_milliseconds,
    statistics_flops,
)
from lightning_soo.placement.plan import Plan, PlannedParameter
from lightning_soo.planning.machine import Machine
from lightning_soo.planning.traffic import INTERVAL, STATISTICS, Flow, flows

ByRank = npt.NDArray[np.float64]

# elementwise passes over a rank's elements in a step: largest magnitude, Adam's graft (zeroed, then read with gradient
# and two moments, three written), its norm, the direction written, its norm, the parameter moved
PASSES = 16
PASSES_OF_ADAM = 7
# a diagonal preconditioner of rows: second moments read, the direction read and written
PASSES_OF_ROWS = 3
# passes over a whole band in SONew's step, beside those
_BAND_PASSES = 3
# small operations by parameter in a step, by block (or tile of equal ones) that is applied in a step, and by block that
# is kept in an update of the statistics
_PARAMETER_OPERATIONS, _BLOCK_OPERATIONS = 30, 12


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one plan; arrays have an entry for each rank.

    Attributes:
        memory: name -> bytes: parameters as the engine keeps them, what the optimizer holds, buffers.
        statistics_flops: of one update.
        apply_flops: of one step.
        refresh_flops, core_seconds: of all refreshes in one interval: of products that would take as long, and seconds
            of the reference core. By ``basis="qr"`` those of the device, and none.
        elementwise_bytes: read and written in one step.
        operations: tensor operations in one step.
        flows: what is sent.
    """

    plan: Plan
    memory: Mapping[str, ByRank]
    statistics_flops: ByRank
    apply_flops: ByRank
    refresh_flops: ByRank
    core_seconds: ByRank
    elementwise_bytes: ByRank
    operations: ByRank
    flows: tuple[Flow, ...]
    interval: int
    statistics_frequency: int

    def sent(self, axis: str, when: str) -> ByRank:
        """Bytes over one axis in a step, in an update of statistics, or in an interval."""
        found = np.zeros(self.plan.ranks)
        for flow in self.flows:
            if flow.axis == axis and flow.when == when:
                found += flow.bytes
        return found

    def seconds(self, machine: Machine) -> dict[str, ByRank]:
        """What a step of the optimizer takes, by what it does; refreshes in the background are not in it."""
        times = {STATISTICS: 1.0 / self.statistics_frequency, INTERVAL: 1.0 / self.interval}
        rate = machine.statistics_flops or machine.flops
        travelling, gathering = np.zeros(self.plan.ranks), np.zeros(self.plan.ranks)
        for flow in self.flows:
            largest = np.maximum(flow.bytes, flow.arriving)
            cost = (largest / machine.bandwidth(flow.axis) + flow.collectives * machine.latency) * times.get(
                flow.when, 1.0
            )
            if flow.when == INTERVAL:
                gathering += cost
            else:
                travelling += cost
        return {
            "statistics": self.statistics_flops / rate / self.statistics_frequency,
            "directions": self.apply_flops / machine.flops,
            "elementwise": self.elementwise_bytes / machine.memory_bandwidth,
            "operations": self.operations * machine.operation,
            "collectives": travelling,
            "roots and statistics moved": gathering,
        }


def estimate(optimizer: PlannedOptimizer, plan: Plan, without_gradient: Collection[str] = ()) -> Estimate:
    """Add up what ``plan`` takes.

    Args:
        optimizer: as for :func:`lightning_soo.planning.traffic.flows`.
    """
    options = optimizer.options
    passes = 1
    if plan.units:
        passes = apply_passes(optimizer.method, getattr(options, "damping_method", "exact"))
    statistics, applied = np.zeros(plan.ranks), np.zeros(plan.ranks)
    flops, core = np.zeros(plan.ranks), np.zeros(plan.ranks)
    kept, applied_apart = np.zeros(plan.ranks), np.zeros(plan.ranks)
    stackable = optimizer.block_class.stackable
    tiles: dict[tuple[tuple[int, ...], str, tuple[int, ...]], int] = {}  # elements
    known: dict[tuple[object, ...], tuple[float, float, float, float]] = {}
    at_homes: dict[tuple[int, ...], list[float]] = {}
    for unit in plan.units:
        kind = unit.block.shape, unit.block.orders
        if kind not in known:
            of_statistics = 0.0 if plan.adds_up else statistics_flops(unit.block)  # K-FAC's are of activations
            known[kind] = (
                *(of_statistics, apply_flops(unit.block, passes)),
                *_refresh(unit.block, on_device=options.basis == "qr"),
            )
        found = known[kind]
        statistics[unit.place.keeper] += found[0]
        kept[unit.place.keeper] += 1
        flops[unit.refresher] += found[2]
        core[unit.refresher] += found[3]
        sums = at_homes.setdefault(unit.homes, [0.0, 0.0])
        sums[0] += found[1]
        if stackable and not unit.place.travels:
            tile = unit.homes, unit.block.parameter, unit.block.shape
            tiles[tile] = tiles.get(tile, 0) + math.prod(unit.block.shape)
        else:
            sums[1] += 1
    for (homes, _, _), size in tiles.items():
        at_homes[homes][1] += math.ceil(size / LARGEST_STACK)
    for homes, (work, count) in at_homes.items():
        applied[list(homes)] += work
        applied_apart[list(homes)] += count
    elements = _elements(plan)
    memory = _memory(optimizer, plan, elements)
    trained = elements * np.array([parameter.spec.requires_grad for parameter in plan.parameters])
    widths = np.array([parameter.spec.dtype.itemsize for parameter in plan.parameters], dtype=np.float64)
    moved = PASSES * (trained @ widths)
    by_rows = [_has_diagonal_rows(optimizer, parameter) for parameter in plan.parameters]
    moved += PASSES_OF_ROWS * ((elements * np.array(by_rows)) @ widths)
    if isinstance(options, SONewOptions):
        moved += _BAND_PASSES * memory["statistics"]
    else:  # statistics are read and written, roots read
        moved += 2 * memory["statistics"] / options.statistics_frequency + memory["roots"]
    return Estimate(
        plan=plan,
        memory=memory,
        statistics_flops=statistics,
        apply_flops=applied,
        refresh_flops=flops,
        core_seconds=core,
        elementwise_bytes=moved,
        operations=_PARAMETER_OPERATIONS * (trained > 0).sum(axis=1)
        + _BLOCK_OPERATIONS * (applied_apart + kept / options.statistics_frequency),
        flows=tuple(flows(optimizer, plan, without_gradient)),
        interval=options.precondition_frequency.max,
        statistics_frequency=options.statistics_frequency,
    )


def _has_diagonal_rows(optimizer: PlannedOptimizer, parameter: PlannedParameter) -> bool:
    return any(optimizer.options.has_diagonal_rows(unit.block) for unit in parameter.units)


def _refresh(block: Block, *, on_device: bool) -> tuple[float, float]:
    """Flops, and seconds of the reference core: none where roots are computed on the device."""
    if on_device:
        return qr_flops(block), 0.0
    return refresh_flops(block), refresh_milliseconds(block) / 1000


def qr_flops(block: Block) -> float:
    """Of a refresh by ``basis="qr"``: a product, and a decomposition at about a third of its rate."""
    return sum(10.0 * order**3 for order in block.orders)


def _elements(plan: Plan) -> ByRank:
    """``(ranks, parameters)``: how many elements each rank holds."""
    rows = {row: np.array([stop - start for start, stop in row], dtype=np.float64) for row in set(plan.table.ranges)}
    return np.stack([rows[row] for row in plan.table.ranges])


def _memory(optimizer: PlannedOptimizer, plan: Plan, elements: ByRank) -> dict[str, ByRank]:
    options = optimizer.options
    specs = [parameter.spec for parameter in plan.parameters]
    widths = np.array([spec.dtype.itemsize for spec in specs], dtype=np.float64)
    moments = np.array([_moment_bytes(optimizer, parameter) for parameter in plan.parameters], dtype=np.float64)
    held = plan.sums_at_homes(lambda unit: unit.root_bytes)
    own = plan.sums_at_homes(lambda unit: unit.moment_bytes)
    statistics = np.zeros(plan.ranks)
    for unit in plan.units:
        statistics[unit.place.keeper] += unit.statistics_bytes
    if isinstance(options, SONewOptions):
        bands = [
            (options.bandwidth + 1) * options.dtype_of_bands(spec.dtype).itemsize if parameter.chain is not None else 0
            for parameter, spec in zip(plan.parameters, specs, strict=True)
        ]
        statistics += elements @ np.array(bands, dtype=np.float64)
    held_of = elements * widths
    together = np.minimum(held_of.sum(axis=1), TOGETHER * widths.max(initial=0))
    scratch = np.maximum(held_of.max(axis=1, initial=0.0), together)
    return {
        "parameters": elements @ widths,
        "moments": elements @ moments + np.array(own, dtype=np.float64),
        "statistics": statistics,
        "roots": np.array(held, dtype=np.float64),
        "exchange buffers": np.full(plan.ranks, float(plan.buffer_bytes)),
        "scratch": scratch,
    }


def _moment_bytes(optimizer: PlannedOptimizer, parameter: PlannedParameter) -> int:
    """Of one element: what the graft's state has for it."""
    if not parameter.spec.requires_grad:
        return 0
    options = optimizer.options
    graft = options.grafting if parameter.is_preconditioned else options.fallback
    state: grafting.State = {}
    grafting.initialise(state, torch.empty(1, dtype=parameter.spec.dtype), graft, optimizer.param_groups[0])
    if isinstance(options, SONewOptions) and parameter.chain is not None:
        state.setdefault("exp_avg", torch.empty(1, dtype=parameter.spec.dtype))
    return sum(state[name].element_size() for name in grafting.MOMENTS if name in state)


def refresh_seconds(found: Estimate, machine: Machine) -> ByRank:
    """Seconds that one core of ``machine`` takes for the refreshes of an interval, on each rank."""
    return found.core_seconds * (Machine.core_rate / machine.core_rate)
