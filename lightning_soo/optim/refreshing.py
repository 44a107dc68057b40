"""Statistics to roots: starts refreshes on their schedule and swaps the results in at steps fixed in advance."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from lightning_soo.optim.gathering import Gathering, InFlight, exchange_statistics
from lightning_soo.optim.options import ShampooOptions
from lightning_soo.optim.outcomes import Outcome
from lightning_soo.placement.blocks import ArrayLayout
from lightning_soo.placement.plan import Plan
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.refresh.background import Background
from lightning_soo.refresh.executors import Executor
from lightning_soo.refresh.jobs import Job, JobResult
from lightning_soo.refresh.schedule import RefreshSchedule, stagger_offsets
from lightning_soo.transport import Transport

logger = logging.getLogger(__name__)
# results waited for, one after the other, before a warning
_LATE_IN_A_ROW = 5


class RefreshError(RuntimeError):
    """A block's refresh failed ``max_failures`` times in a row; raised on every rank."""


class Refresher:
    """Owns the background work and what is in flight; the blocks belong to the optimizer."""

    def __init__(
        self,
        *,
        plan: Plan,
        blocks: Mapping[str, KroneckerBlock],
        schedule: RefreshSchedule,
        background: Background,
        transport: Transport,
        max_failures: int,
        ridge: str = "preconditioner_eps",
        limit: str | None = "max_factor_dim",
    ) -> None:
        """Args:
        ridge: the option to raise where a matrix cannot be inverted.
        limit: the option to lower where refreshes take too long.
        """
        self.blocks = blocks
        self.places = {unit.key: unit.place for unit in sorted(plan.units, key=lambda unit: unit.key)}
        self.schedule = schedule
        self.background = background
        self._transport = transport
        self.rank, self.ranks = transport.rank, transport.size
        self._max_failures, self._ridge, self._limit = max_failures, ridge, limit
        self.in_flight: list[InFlight] = []
        self._gathering: Gathering | None = None
        self._late, self._said = 0, False
        self.waited = 0.0  # seconds the training thread has waited for results that were to be ready

    @property
    def executor(self) -> Executor:
        """The workers, made when they are first needed."""
        return self.background.executor

    def advance(
        self,
        step: int,
        make_job: Callable[[KroneckerBlock, KroneckerStatistics], Job | JobResult],
        keys: Collection[str] | None = None,
    ) -> None:
        """Start the refreshes of this step, swap in those whose time has come, send those of the next step.

        Args:
            make_job: what a worker is to do, or what needed none.
            keys: the blocks of this part of the step; None is all of them.

        Raises:
            RefreshError: on every rank, after too many failures of one block.
        """
        self.background.poll()
        self._start(step, make_job, keys)
        self._finish_gather()
        in_part = [entry for entry in self.in_flight if keys is None or entry.key in keys]
        due = [entry for entry in in_part if entry.swap <= step]
        if due:
            self._start_gather([entry for entry in due if entry.delivered is None])
            self._finish_gather()
            swapped = {id(entry) for entry in due}
            self.in_flight = [entry for entry in self.in_flight if id(entry) not in swapped]
            for entry in due:
                assert entry.delivered is not None
                self._install(entry, entry.delivered)
        # a transfer of roots overlaps the next forward and backward pass, unless that would leave a refresh no step
        # of its own to run in
        coming = [e for e in in_part if e.swap == step + 1 and e.started < step and e.delivered is None]
        if coming and self._transport.size > 1:
            self._start_gather(coming)

    def _start(
        self,
        step: int,
        make_job: Callable[[KroneckerBlock, KroneckerStatistics], Job | JobResult],
        keys: Collection[str] | None,
    ) -> None:
        starting = []
        for key in self.places:
            block = self.blocks[key]
            if (
                (keys is not None and key not in keys)
                or not self.schedule.refreshes(key, step)
                or block.observations == block.refreshed_observations
            ):
                continue
            block.refreshed_observations = block.observations
            self.in_flight.append(InFlight(key=key, started=step, swap=self.schedule.swap_step(step)))
            starting.append(key)
        away = [(key, self.places[key]) for key in starting if self.places[key].keeper != self.places[key].refresher]
        sent = exchange_statistics(self._transport, self.blocks, away) if away else {}
        for key in starting:
            if self.places[key].refresher == self._transport.rank:
                block = self.blocks[key]
                statistics = sent.get(key) or block.statistics
                assert statistics is not None
                made = make_job(block, statistics)
                if isinstance(made, JobResult):
                    self.background.keep((key, step), made)
                else:
                    self.background.submit((key, step), made, statistics.matrices)

    def close(self) -> None:
        """Finish what is under way, here and between ranks, and stop the workers."""
        self._finish_gather()
        self.drain()
        self.background.close()

    def drain(self) -> None:
        """Wait for this rank's own refreshes in flight and keep their outcomes; nothing is swapped in or received."""
        for entry in self.in_flight:
            self._collect(entry)

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Forget what is in flight and take a checkpoint's instead; every rank has every outcome there."""
        self._finish_gather()
        self.background.close()
        self.in_flight = [
            InFlight(key=row["key"], started=row["started"], swap=row["swap"], delivered=self._delivered(row))
            for row in rows
        ]

    def _delivered(self, row: Mapping[str, Any]) -> Outcome:
        """A checkpoint's result, as a worker of this run would have given it: on the host, in this run's dtype."""
        outcome = row["outcome"]
        roots, dtype = outcome["roots"], self._layout(row["key"])[1]
        if roots is not None:
            roots = [root.to(device="cpu", dtype=dtype) for root in roots]
        return Outcome(**{"ok": roots is not None, **outcome, "roots": roots})

    def hand_over(self, other: Refresher) -> None:
        """Give another refresher what is in flight: the plan was built anew, the executor stays."""
        self._finish_gather()
        other.waited, other._late, other._said = self.waited, self._late, self._said
        other.in_flight = [entry for entry in self.in_flight if other.blocks.get(entry.key) is self.blocks[entry.key]]

    def _collect(self, entry: InFlight) -> None:
        """Take this rank's own result from the executor, waiting for it if need be."""
        if entry.known is None and self.places[entry.key].refresher == self._transport.rank:
            begin = time.monotonic()
            result = self.background.result((entry.key, entry.started))
            if entry.swap > entry.started and self.executor.kind != "deferred":  # those are waited for on purpose
                self._watch(time.monotonic() - begin, result.seconds, self.schedule.is_settled(entry.started))
            restarts = float(self.background.restarts)
            entry.own = Outcome.of(result, *self._layout(entry.key), waited=self.waited, restarts=restarts)

    def _watch(self, waited: float, seconds: float, settled: bool) -> None:
        """Say once, when results are late again and again, what to change.

        Args:
            settled: whether the interval has stopped growing; what is waited for before passes by itself.
        """
        self.waited += waited
        self._late = self._late + 1 if settled and waited > max(0.1 * seconds, 0.01) else 0
        if self._late >= _LATE_IN_A_ROW and not self._said:
            self._said = True
            logger.warning(
                "refreshes cannot keep up: the last %d results were waited for (%.2f s for the last one, which took "
                "%.2f s). Raise precondition_frequency (%s) or refresh_delay, %sgive workers more cores "
                "(workers={'kind': 'process', 'count': ...})",
                self._late,
                waited,
                seconds,
                self.schedule.interval,
                f"lower {self._limit}, or " if self._limit else "or ",
            )

    def _start_gather(self, entries: list[InFlight]) -> None:
        """Send own outcomes to the blocks' homes: they get the refresher's bits and never recompute a root.

        Which entries, and so every size, is the same on all ranks.
        """
        for entry in entries:
            self._collect(entry)
        if self._transport.size == 1 or not entries:
            for entry in entries:
                entry.delivered = entry.own
            return
        self._gathering = Gathering(self._transport, entries, self.places, self._layout)

    def _finish_gather(self) -> None:
        if self._gathering is not None:
            self._gathering.finish()
            self._gathering = None

    def _layout(self, key: str) -> tuple[tuple[ArrayLayout, ...], torch.dtype]:
        block = self.blocks[key]
        return block.root_layouts(block.block), block.compute_dtype

    def _install(self, entry: InFlight, outcome: Outcome) -> None:
        block = self.blocks[entry.key]
        if not outcome.ok:
            block.failures += 1
            logger.warning(
                "refresh of %s started at step %d failed (%d in a row): %s; the previous root stays in use",
                entry.key,
                entry.started,
                block.failures,
                outcome.error,
            )
            if block.failures >= self._max_failures:
                raise RefreshError(
                    f"block {entry.key}: {block.failures} refreshes in a row failed on rank "
                    f"{self.places[entry.key].refresher} (its log says why), the last one started at step "
                    f"{entry.started} (condition number {outcome.condition_number:.3g}, residual "
                    f"{outcome.residual:.3g}). "
                    f"Raise {self._ridge}, or exclude the parameter with "
                    f"overrides=[{{'match': {entry.key.split('/')[0]!r}, 'method': 'none'}}]"
                )
            return
        block.failures, block.ready = 0, True
        if self._transport.rank in self.places[entry.key].homes:
            assert outcome.roots is not None
            block.roots = self.background.copies.to_device(outcome.roots, block.device).use()
        block.diagnostics = {
            "condition_number": outcome.condition_number,
            "residual": outcome.residual,
            "seconds": outcome.seconds,
            "waited": outcome.waited,
            "restarts": outcome.restarts,
            "started": float(entry.started),
        }


def make_schedule(options: ShampooOptions, plan: Plan) -> RefreshSchedule:
    """The clock that ``options`` set for the blocks of ``plan``."""
    blocks = [unit.block for unit in plan.units]
    return RefreshSchedule(
        interval=options.precondition_frequency,
        delay=options.refresh_delay,
        start=options.start,
        gather=options.gather_frequency or 1,
        statistics=options.statistics_frequency,
        statistics_follow=options.statistics_follow_interval,
        offsets=stagger_offsets(blocks, options.precondition_frequency.max) if options.stagger else {},
    )
