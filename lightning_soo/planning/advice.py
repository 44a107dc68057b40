"""What of a plan cannot work on a machine, and which options to change."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lightning_soo.optim.options import ShampooOptions
from lightning_soo.optim.planned import PlannedOptimizer
from lightning_soo.placement.assignment import assign
from lightning_soo.placement.blocks import Block, partition
from lightning_soo.placement.costs import refresh_milliseconds, statistics_flops
from lightning_soo.placement.overrides import resolve
from lightning_soo.placement.plan import Plan
from lightning_soo.planning.estimates import ByRank, qr_flops
from lightning_soo.planning.machine import Machine
from lightning_soo.planning.waiting import Load, crew
from lightning_soo.refresh.schedule import delay_within, stagger_offsets

_SMALLEST_DIM = 64
# of a step: what rounding and the spread of refreshes over steps make, and what training may stand still on purpose
_TOLERATED, _TOLERATED_ON_PURPOSE = 0.01, 0.1
_LONGEST_INTERVAL, _MOST_WORKERS = 1 << 17, 1 << 10
# a rank's statistics above this multiple of the mean, where that is this share of a step, are worth a word
_UNEVEN, _WORTH_A_WORD = 2.0, 0.02
_MUCH_TRAFFIC = 0.25  # of a step


@dataclass(frozen=True, kw_only=True)
class Refreshes:
    """Those of the ranks that decide how long training waits: the one with most work, and that of the longest one.

    Attributes:
        optimizer: on the machine whose ``cores`` compute roots.
    """

    optimizer: PlannedOptimizer
    plan: Plan
    machine: Machine

    def _seconds(self, block: Block) -> float:
        """Of one worker."""
        if self.optimizer.options.basis == "qr":
            return qr_flops(block) / (self.machine.statistics_flops or self.machine.flops)
        return refresh_milliseconds(block) / 1000 * (Machine.core_rate / self.machine.core_rate)

    @cached_property
    def _by_rank(self) -> list[dict[str, float]]:
        """Block key -> seconds, of each rank that is looked at."""
        return _decisive([(unit.block, unit.refresher) for unit in self.plan.units], self._seconds)

    @cached_property
    def _blocks(self) -> list[Block]:
        return [unit.block for unit in self.plan.units]

    def _loads(self, options: ShampooOptions, cores: float) -> list[Load]:
        return _loads(options, self._by_rank, self._blocks, cores)

    @cached_property
    def loads(self) -> list[Load]:
        return self._loads(self.optimizer.options, self.machine.cores)

    @property
    def holds_training(self) -> bool:
        """Whether training stands still for every refresh, whatever its length."""
        return any(load.crew.holds_training for load in self.loads)

    def settled_wait(self, step_seconds: float) -> float:
        """See :meth:`Load.settled_wait`; of the rank that waits most."""
        return max((load.settled_wait(step_seconds) for load in self.loads), default=0.0)

    def early_wait(self, step_seconds: float) -> float:
        """See :meth:`Load.early_wait`; of the rank that waits most."""
        return max((load.early_wait(step_seconds) for load in self.loads), default=0.0)

    def shortest_step(self) -> float:
        """Seconds of a step with which refreshes just keep up."""
        needed = max(sum(load.seconds.values()) for load in self.loads)
        return _least(lambda step: self.settled_wait(step) <= _TOLERATED * step, needed / 1e4, needed * 1e2) or math.inf

    def late(self, step_seconds: float) -> list[str]:
        """In words, where training waits: for what, and each change that would be enough."""
        wait = self.settled_wait(step_seconds)
        on_purpose = self.holds_training
        tolerated = (_TOLERATED_ON_PURPOSE if on_purpose else _TOLERATED) * step_seconds
        if wait <= tolerated:
            return []
        options = self.optimizer.options
        length = options.precondition_frequency.max
        load = max(self.loads, key=lambda load: load.settled_wait(step_seconds))
        key, longest = max(load.seconds.items(), key=lambda item: item[1])
        what = "refreshes hold training up for" if on_purpose else "refreshes cannot keep up: training would wait"
        due = delay_within(length) if options.refresh_delay is None else options.refresh_delay
        text = (
            f"{what} {wait:.3g} s in a step of {step_seconds:.3g} s. The slowest rank needs "
            f"{sum(load.seconds.values()):.3g} seconds of one core in an interval of {length} steps, {longest:.3g} of "
            f"them for {key}"
        )
        if not on_purpose:
            text += f", which is due {due} steps ({due * step_seconds:.3g} s) after it was started"
        return [f"{text}. Enough would be {', or '.join(ways)}" if (ways := self._ways(step_seconds)) else text]

    def _ways(self, step_seconds: float) -> list[str]:
        """Every single change with which training does not wait."""
        options, cores = self.optimizer.options, self.machine.cores
        interval, workers = options.precondition_frequency, options.workers

        def works(changed: ShampooOptions, cores: float) -> bool:
            return _is_enough(self._loads(changed, cores), step_seconds)

        def longer(length: int) -> ShampooOptions:
            first = interval.first if interval.grows else length
            return replace(options, precondition_frequency=replace(interval, first=first, max=length))

        ways = []
        length = _fewest(lambda count: works(longer(count), cores), interval.max + 1, _LONGEST_INTERVAL)
        if length is not None:
            now = longer(length).precondition_frequency
            value = {"first": now.first, "growth": now.growth, "max": now.max} if now.grows else length
            ways.append(f"precondition_frequency={value}")
        if options.basis != "qr" and options.refresh_delay != 0:
            delay = _fewest(
                lambda steps: works(replace(options, refresh_delay=steps), cores),
                1 + (delay_within(interval.max) if options.refresh_delay is None else options.refresh_delay),
                interval.max,
            )
            if delay is not None:
                ways.append(f"refresh_delay={delay}")

            def more(count: int) -> ShampooOptions:
                return replace(options, workers=replace(workers, kind="process", count=count))

            count = _fewest(lambda count: works(more(count), count), 1, _MOST_WORKERS)
            if count is not None:
                where = f" on {count} cores of each rank (--cores)" if count > cores else ""
                ways.append(f"workers={{'kind': 'process', 'count': {count}}}{where}")
        size = self._smaller_dim(step_seconds)
        if size is not None:
            ways.append(f"max_factor_dim={size}")
        return ways

    def _smaller_dim(self, step_seconds: float) -> int | None:
        """The largest halved ``max_factor_dim`` that is enough."""
        options, plan = self.optimizer.options, self.plan
        if plan.adds_up:
            return None  # layers are not cut by size
        size = min(options.max_factor_dim or options.max_preconditioner_dim, options.max_preconditioner_dim) // 2
        while size >= _SMALLEST_DIM:
            blocks = self._blocks_of(replace(options, max_factor_dim=size))
            owners = assign([refresh_milliseconds(block) for block in blocks], plan.ranks)
            by_rank = _decisive(list(zip(blocks, owners, strict=True)), self._seconds)
            if _is_enough(_loads(options, by_rank, blocks, self.machine.cores), step_seconds):
                return size
            size //= 2
        return None

    def _blocks_of(self, options: ShampooOptions) -> list[Block]:
        specs = [parameter.spec for parameter in self.plan.parameters]
        found = []
        for spec, (method, rules) in zip(specs, resolve(specs, options.block_rules, options.overrides), strict=True):
            if method != "none" and spec.requires_grad:
                found += partition(spec.name, spec.shape, rules)[0]
        return found


def _decisive(owned: Sequence[tuple[Block, int]], seconds: Callable[[Block], float]) -> list[dict[str, float]]:
    """Of the rank with most work and of that of the longest refresh: block key -> seconds."""
    known: dict[tuple[int, ...], float] = {}
    loads: dict[int, float] = {}
    longest = (0.0, -1)
    for block, rank in owned:
        if block.orders not in known:
            known[block.orders] = seconds(block)
        each = known[block.orders]
        loads[rank] = loads.get(rank, 0.0) + each
        longest = max(longest, (each, rank))
    if not loads:
        return []
    ranks = dict.fromkeys([max(loads, key=lambda rank: loads[rank]), longest[1]])
    return [{block.key: known[block.orders] for block, owner in owned if owner == rank} for rank in ranks]


def _loads(
    options: ShampooOptions, by_rank: Sequence[Mapping[str, float]], blocks: Sequence[Block], cores: float
) -> list[Load]:
    offsets = stagger_offsets(blocks, options.precondition_frequency.max) if options.stagger else {}
    return [
        Load(options=options, seconds=one, offsets=offsets, crew=crew(options, cores, sum(one.values())))
        for one in by_rank
    ]


def _is_enough(loads: Sequence[Load], step_seconds: float) -> bool:
    return all(
        load.settled_wait(step_seconds)
        <= (_TOLERATED_ON_PURPOSE if load.crew.holds_training else _TOLERATED) * step_seconds
        for load in loads
    )


def _fewest(works: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number in ``[low, high]`` that works, where more never is worse."""
    last, tried = low - 1, low
    while not works(tried):
        if tried >= high:
            return None
        last, tried = tried, min(high, 2 * tried)
    while tried - last > 1:
        middle = (last + tried) // 2
        if works(middle):
            tried = middle
        else:
            last = middle
    return tried


def _least(works: Callable[[float], bool], low: float, high: float) -> float | None:
    """The smallest number in between that works, to a hundredth."""
    if not works(high):
        return None
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        if works(middle):
            high = middle
        else:
            low = middle
    return high


def uneven_statistics(plan: Plan, flops: ByRank, seconds: ByRank, step_seconds: float) -> list[str]:
    """In words, where a few blocks give one rank much more to do than others, and a step feels it.

    Args:
        flops: of one update, by rank.
        seconds: of a step, by rank.
    """
    excess = float(seconds.max() - seconds.mean())
    if plan.ranks == 1 or flops.max() <= _UNEVEN * flops.mean() or excess <= _WORTH_A_WORD * step_seconds:
        return []
    full = set(np.flatnonzero(flops > _UNEVEN * flops.mean()).tolist())
    largest: dict[str, Block] = {}
    for unit in plan.units:
        block = unit.block
        if unit.place.keeper in full and statistics_flops(block) > flops.mean():
            known = largest.get(block.parameter)
            if known is None or math.prod(block.shape) > math.prod(known.shape):
                largest[block.parameter] = block
    if not largest:
        return []
    shapes = " and ".join(f"{name} ({'x'.join(map(str, block.shape))})" for name, block in largest.items())
    return [
        f"statistics are uneven: one rank has {flops.max() / flops.mean():.1f} times the mean, {1000 * excess:.3g} ms "
        f"of a step more, because blocks are not divided: {shapes}. {_left_out(largest)}"
    ]


def traffic(plan: Plan, seconds: float, step_seconds: float, without: str) -> list[str]:
    """In words, where gradients of cut blocks take much of a step on their way.

    Args:
        seconds: of a step, for all that travels in it.
        without: how nothing would travel.
    """
    elements: dict[str, int] = {}
    for unit in plan.units:
        if unit.place.travels:
            name = unit.block.parameter
            elements[name] = elements.get(name, 0) + math.prod(unit.block.shape)
    if not elements or seconds <= _MUCH_TRAFFIC * step_seconds:
        return []
    total = sum(elements.values())
    text = (
        f"collectives take {seconds:.3g} s of a step of {step_seconds:.3g} s: gradients of blocks that are cut by the "
        "sharding travel"
    )
    most = [name for name, count in elements.items() if 4 * count >= total]
    share = sum(elements[name] for name in most) / total
    if 2 * share < 1:
        return [f"{text}, of {len(elements)} parameters; {without}"]
    return [f"{text}, {share:.0%} of them of {' and '.join(most)}. {_left_out(most)}; {without}"]


def _left_out(names: Collection[str]) -> str:
    entries = ", ".join(f"{{'match': {f'^{re.escape(name)}$'!r}, 'method': 'none'}}" for name in names)
    return f"overrides=[{entries}] leaves {'them' if len(names) > 1 else 'it'} to the graft"
