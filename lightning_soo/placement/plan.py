"""The plan: every parameter's blocks, who refreshes each, what it costs. A pure function; the same on every rank."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_soo.placement.assignment import assign
from lightning_soo.placement.blocks import Block, BlockRules, partition
from lightning_soo.placement.costs import owner_milliseconds_per_step
from lightning_soo.placement.overrides import Override, ParameterSpec, resolve


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is owned as one: a block, and the rank whose workers compute its statistics and roots.

    Every replica is a home: it holds the roots and applies them to its own copy of the gradient.
    """

    block: Block
    refresher: int
    milliseconds_per_step: float

    @property
    def key(self) -> str:
        return self.block.key


@dataclass(frozen=True, kw_only=True)
class PlannedParameter:
    """One row of the plan; ``reason`` says why there are no units."""

    spec: ParameterSpec
    units: tuple[Unit, ...]
    reason: str

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_preconditioned(self) -> bool:
        return bool(self.units)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was decided before the first step."""

    parameters: tuple[PlannedParameter, ...]
    ranks: int

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(unit for parameter in self.parameters for unit in parameter.units)

    @property
    def loads(self) -> list[float]:
        """Milliseconds per step that each rank spends for the units it owns."""
        loads = [0.0] * self.ranks
        for unit in self.units:
            loads[unit.refresher] += unit.milliseconds_per_step
        return loads

    @property
    def balance(self) -> float:
        """Largest load over the mean load: 1 is perfect."""
        mean = sum(self.loads) / self.ranks
        return max(self.loads) / mean if mean > 0 else 1.0

    @property
    def preconditioned_share(self) -> float:
        """Elements of preconditioned parameters over all trainable elements."""
        total = sum(math.prod(p.spec.shape) for p in self.parameters if p.spec.requires_grad)
        covered = sum(math.prod(p.spec.shape) for p in self.parameters if p.is_preconditioned)
        return covered / total if total else 0.0

    def digest(self) -> str:
        """Hash of everything that must be the same on every rank."""
        rows = [
            [p.name, list(p.spec.shape), p.reason, [[u.key, u.refresher, list(u.block.dims)] for u in p.units]]
            for p in self.parameters
        ]
        return hashlib.sha256(json.dumps([self.ranks, rows]).encode()).hexdigest()


def build_plan(
    specs: Sequence[ParameterSpec],
    rules: BlockRules,
    *,
    overrides: Sequence[Override] = (),
    ranks: int = 1,
    precondition_frequency: int = 20,
    statistics_frequency: int = 1,
    previous: Mapping[str, int] | None = None,
) -> Plan:
    """Cut parameters into blocks and balance their refreshers over ``ranks``.

    Args:
        previous: block key -> refresher of the plan before; blocks that are still there stay where they are, so that
            nothing moves when a parameter group is added.
    """
    previous = previous or {}
    cut: list[tuple[ParameterSpec, list[Block], str]] = []
    for spec, (method, own) in zip(specs, resolve(specs, rules, overrides), strict=True):
        blocks: list[Block] = []
        if not spec.requires_grad:
            reason = "frozen"
        elif method == "none":
            reason = "override: none"
        else:
            blocks, reason = partition(spec.name, spec.shape, own)
        cut.append((spec, blocks, reason))

    costs = {
        block.key: owner_milliseconds_per_step(
            block, precondition_frequency=precondition_frequency, statistics_frequency=statistics_frequency
        )
        for _, blocks, _ in cut
        for block in blocks
    }
    owners = {key: previous[key] for key in costs if key in previous}
    loads = [0.0] * ranks
    for key, owner in owners.items():
        loads[owner] += costs[key]
    new = [key for key in costs if key not in owners]
    owners.update(zip(new, assign([costs[key] for key in new], ranks, loads), strict=True))

    parameters = tuple(
        PlannedParameter(
            spec=spec,
            reason=reason,
            units=tuple(
                Unit(block=block, refresher=owners[block.key], milliseconds_per_step=costs[block.key])
                for block in blocks
            ),
        )
        for spec, blocks, reason in cut
    )
    return Plan(parameters=parameters, ranks=ranks)
