"""Statistics to roots: starts refreshes on their schedule and swaps the results in at steps fixed in advance."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_soo.placement.plan import Plan
from lightning_soo.preconditioners.kronecker import KroneckerBlock
from lightning_soo.refresh.executors import Executor
from lightning_soo.refresh.jobs import Job, JobResult
from lightning_soo.refresh.schedule import RefreshSchedule
from lightning_soo.transport import Transport, pack_bytes, template_size, unpack_bytes

logger = logging.getLogger(__name__)
# ok, condition number, residual, seconds
_HEADER = ((4,), torch.float64)


class RefreshError(RuntimeError):
    """A block's refresh failed ``max_failures`` times in a row; raised on every rank."""


@dataclass(kw_only=True)
class InFlight:
    """A refresh between its start and its swap; the same list on every rank.

    Attributes:
        delivered: the outcome, where it is already known: drained for a checkpoint, or restored from one.
    """

    key: str
    started: int
    swap: int
    delivered: Outcome | None = None


@dataclass(kw_only=True)
class Outcome:
    """A finished refresh as every rank sees it; no ``roots`` where it failed."""

    roots: list[Tensor] | None
    condition_number: float
    residual: float
    seconds: float
    error: str = ""


class Refresher:
    """Owns the executor and what is in flight; the blocks belong to the optimizer."""

    def __init__(
        self,
        *,
        plan: Plan,
        blocks: Mapping[str, KroneckerBlock],
        schedule: RefreshSchedule,
        executor: Executor,
        transport: Transport,
        device_of: Callable[[str], torch.device],
        max_failures: int,
    ) -> None:
        self._blocks = blocks
        self._owners = {unit.key: unit.refresher for unit in sorted(plan.units, key=lambda unit: unit.key)}
        self.schedule = schedule
        self.executor = executor
        self._transport = transport
        self.device_of = device_of
        self._max_failures = max_failures
        self.in_flight: list[InFlight] = []

    def advance(self, step: int, make_job: Callable[[KroneckerBlock], Job]) -> None:
        """Start the refreshes of this step, then swap in those whose time has come.

        Raises:
            RefreshError: on every rank, after too many failures of one block.
        """
        for key, owner in self._owners.items():
            block = self._blocks[key]
            if not self.schedule.refreshes(key, step) or block.observations == block.refreshed_observations:
                continue
            block.refreshed_observations = block.observations
            self.in_flight.append(InFlight(key=key, started=step, swap=self.schedule.swap_step(step)))
            if owner == self._transport.rank:
                self.executor.submit((key, step), make_job(block))
        due = [entry for entry in self.in_flight if entry.swap <= step]
        if due:
            self.in_flight = [entry for entry in self.in_flight if entry.swap > step]
            for entry, outcome in zip(due, self._gather(due), strict=True):
                self._install(entry, outcome)

    def drain(self) -> None:
        """Wait for this rank's own refreshes in flight and keep their outcomes; nothing is swapped in."""
        for entry in self.in_flight:
            if entry.delivered is None and self._owners[entry.key] == self._transport.rank:
                entry.delivered = self._outcome(entry)

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Forget what is in flight and take a checkpoint's instead; every rank has every outcome there."""
        self.executor.close()
        self.in_flight = [
            InFlight(key=row["key"], started=row["started"], swap=row["swap"], delivered=Outcome(**row["outcome"]))
            for row in rows
        ]

    def _outcome(self, entry: InFlight) -> Outcome:
        result: JobResult = self.executor.result((entry.key, entry.started))
        dtype = self._blocks[entry.key].compute_dtype
        return Outcome(
            roots=[torch.from_numpy(array).to(dtype) for array in result.arrays] or None,
            condition_number=result.diagnostics.get("condition_number", float("nan")),
            residual=result.diagnostics.get("residual", float("nan")),
            seconds=result.seconds,
            error=result.error,
        )

    def _gather(self, due: list[InFlight]) -> list[Outcome]:
        """Every rank gets every outcome, the refresher's bits: replicas never recompute a root."""
        rank, size = self._transport.rank, self._transport.size
        outcomes: dict[int, Outcome] = {}
        for index, entry in enumerate(due):
            if self._owners[entry.key] == rank:
                outcomes[index] = entry.delivered or self._outcome(entry)
        if size == 1:
            return [outcomes[index] for index in range(len(due))]
        templates = [self._templates(entry.key) for entry in due]
        sizes, packed = [0] * size, []
        for index, entry in enumerate(due):
            sizes[self._owners[entry.key]] += template_size(templates[index])
            if index in outcomes:
                packed += self._message(outcomes[index], templates[index])
        flats = self._transport.broadcast_from_owners(sizes, pack_bytes(packed) if sizes[rank] else None)
        positions = [0] * size
        for index, entry in enumerate(due):
            owner, length = self._owners[entry.key], template_size(templates[index])
            if index not in outcomes:
                part = flats[owner][positions[owner] : positions[owner] + length]
                header, *roots = unpack_bytes(part, templates[index])
                ok, condition_number, residual, seconds = header.tolist()
                outcomes[index] = Outcome(
                    roots=[root.clone() for root in roots] if ok else None,
                    condition_number=condition_number,
                    residual=residual,
                    seconds=seconds,
                    error="" if ok else f"failed on rank {owner}",
                )
            positions[owner] += length
        return [outcomes[index] for index in range(len(due))]

    def _templates(self, key: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
        block = self._blocks[key]
        return [_HEADER, *(((order, order), block.compute_dtype) for order in block.block.orders)]

    @staticmethod
    def _message(outcome: Outcome, templates: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        header = torch.tensor(
            [float(outcome.roots is not None), outcome.condition_number, outcome.residual, outcome.seconds],
            dtype=torch.float64,
        )
        roots = outcome.roots or [torch.zeros(shape, dtype=dtype) for shape, dtype in templates[1:]]
        return [header, *roots]

    def _install(self, entry: InFlight, outcome: Outcome) -> None:
        block = self._blocks[entry.key]
        if outcome.roots is None:
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
                    f"block {entry.key}: {block.failures} refreshes in a row failed, the last one started at step "
                    f"{entry.started} ({outcome.error}). Raise preconditioner_eps, or exclude the parameter with "
                    f"overrides=[{{'match': {entry.key.split('/')[0]!r}, 'method': 'none'}}]"
                )
            return
        block.failures = 0
        device = self.device_of(entry.key)
        block.roots = [root.to(device) for root in outcome.roots]
        block.diagnostics = {
            "condition_number": outcome.condition_number,
            "residual": outcome.residual,
            "seconds": outcome.seconds,
            "started": float(entry.started),
        }
