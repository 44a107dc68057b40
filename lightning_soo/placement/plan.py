"""The plan: every parameter's blocks, where each lives, what it costs. The same on every rank."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lightning_soo.placement.assignment import smallest_largest_load
from lightning_soo.placement.blocks import Block
from lightning_soo.placement.exchange import Bucket, Integers
from lightning_soo.placement.homes import Place
from lightning_soo.placement.layout import FragmentTable
from lightning_soo.placement.overrides import ParameterSpec


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
        joined: keys of other parameters' units that it is preconditioned with: a bias, with its weight.
        note: what else a user should know.
    """

    spec: ParameterSpec
    units: tuple[Unit, ...]
    reason: str
    chain: int | None = None
    joined: tuple[str, ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_preconditioned(self) -> bool:
        return bool(self.units or self.joined) or self.chain is not None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was decided before the first step.

    Attributes:
        buckets: part of the step -> what travels in it, in order.
        adds_up: whether statistics are contributions of all ranks, added up where they are kept (K-FAC).
        exchanges: buffers of each bucket on the way to the homes: the filtered gradient, and the gradient where the
            method wants both.
    """

    parameters: tuple[PlannedParameter, ...]
    table: FragmentTable
    buckets: Mapping[int, tuple[Bucket, ...]]
    exchanges: int = 1
    adds_up: bool = False

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
        """Milliseconds per step that each rank's refreshes take on one thread of the reference machine."""
        loads = [0.0] * self.ranks
        for unit in self.units:
            loads[unit.refresher] += unit.place.milliseconds
        return loads

    @property
    def balance(self) -> float:
        """Largest load over the mean load: 1 is perfect."""
        return _largest_over_mean(self.loads)

    @cached_property
    def least_balance(self) -> float:
        """What :attr:`balance` is at least, whoever refreshes what: blocks are not divided."""
        costs = [unit.place.milliseconds for unit in self.units]
        total = sum(costs)
        return smallest_largest_load(costs, self.ranks) * self.ranks / total if total > 0 else 1.0

    @property
    def state_bytes(self) -> list[int]:
        """Preconditioner state of each rank: roots where they are applied, statistics where they are kept."""
        count = self.sums_at_homes(lambda unit: unit.root_bytes + unit.moment_bytes)
        for unit in self.units:
            count[unit.place.keeper] += unit.statistics_bytes
        return count

    def sums_at_homes(self, value: Callable[[Unit], int]) -> list[int]:
        """For each rank the sum of ``value`` over the units whose home it is."""
        sums: dict[tuple[int, ...], int] = {}
        for unit in self.units:
            sums[unit.homes] = sums.get(unit.homes, 0) + value(unit)
        count = [0] * self.ranks
        for homes, total in sums.items():
            for home in homes:
                count[home] += total
        return count

    @property
    def state_balance(self) -> float:
        """Largest state of a rank over the mean state."""
        return _largest_over_mean(self.state_bytes)

    @property
    def exchange_bytes(self) -> int:
        """The most that any rank sends or receives of gradients, one way, per step."""
        sent, received = self.bytes_away()
        return max(0, int(sent.max()), int(received.max()))

    def bytes_away(self, buckets: Iterable[Bucket] | None = None) -> tuple[Integers, Integers]:
        """Bytes that every place of a copy sends to others as a holder, and gets from others as a home.

        Args:
            buckets: None is all of them.
        """
        sent, received = np.zeros(self.table.shards, dtype=np.int64), np.zeros(self.table.shards, dtype=np.int64)
        for bucket in self._all_buckets if buckets is None else buckets:
            leaving, arriving = bucket.away
            sent += leaving * bucket.dtype.itemsize
            received += arriving * bucket.dtype.itemsize
        return sent, received

    @property
    def buffer_bytes(self) -> int:
        """The most that exchange buffers occupy on a rank: two buckets under way, each with its way back."""
        largest = sorted((bucket.largest_bytes for bucket in self._all_buckets), reverse=True)[:2]
        return 2 * (self.exchanges + 1) * sum(largest)

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
        everywhere = {homes: index for index, homes in enumerate(dict.fromkeys(unit.homes for unit in self.units))}
        rows = [
            [
                *(p.name, list(p.spec.shape), str(p.spec.dtype), p.spec.part, p.reason, p.chain, list(p.joined)),
                [[u.key, u.refresher, everywhere[u.homes], u.place.travels, *_matrices(u.block)] for u in p.units],
            ]
            for p in self.parameters
        ]
        buckets = [[part, [[t.key for t in b.travellers] for b in found]] for part, found in self.buckets.items()]
        found = [self.table.digest_rows(), rows, buckets, list(everywhere)]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def blocks_digest(self) -> str:
        """Hash of what is preconditioned and in which blocks: the same at any number of ranks under any engine."""
        rows = sorted(
            [p.name, list(p.spec.shape), p.chain, [[u.key, *_matrices(u.block)] for u in p.units]]
            for p in self.parameters
            if p.is_preconditioned
        )
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _matrices(block: Block) -> list[list[int]]:
    """What a digest says of a block's preconditioners: their dimensions, and the orders where one has several."""
    return [list(block.dims)] + ([list(block.orders)] if block.has_several else [])


def _largest_over_mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return max(values) / mean if mean > 0 else 1.0
