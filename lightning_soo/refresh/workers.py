"""Which executor: the user's choice, or one from the cost of the blocks and the cores of this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning_soo.naming import nearest
from lightning_soo.refresh.cores import available_cores
from lightning_soo.refresh.executors import Executor, InlineExecutor, ThreadExecutor
from lightning_soo.refresh.processes import ProcessExecutor

logger = logging.getLogger(__name__)
KINDS = ("auto", "inline", "deferred", "thread", "process")
# a refresh of all blocks below this is not worth handing over
_INLINE_MILLISECONDS = 2.0
# processes beyond these gain little and cost memory
_MOST_PROCESSES = 8
_DEADLINE = 120.0  # seconds


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How roots are computed. When they are used does not depend on it, and neither do their bits.

    Attributes:
        kind: ``"inline"`` (in the step that starts them), ``"deferred"`` (in the first step that needs one of them, all
            that have come at once, while training waits), ``"thread"`` (background threads), ``"process"`` (background
            processes), or ``"auto"``: inline for tiny blocks, processes where cores are spare, else deferred.
        count: how many for each rank; None is one background thread, as many processes as there are spare cores, and
            all cores of this rank where the step waits anyway.
        threads_per_worker: BLAS threads of a worker process; with more than one the last bits of a root depend on it.
        cpus: cores that worker processes are pinned to, in turn, the same for every rank: for one rank on a machine;
            None leaves them to the system.
        nice: lowers the priority of worker processes.
        deadline: seconds a result that is due is waited for before its worker is replaced. Other ranks wait meanwhile,
            so it must be less than a third of ``collective_timeout``; None is 120, or a quarter of that where it is
            less.
        max_restarts: worker processes that may be replaced before roots are computed in the training thread.
        max_failures: refreshes of one block that may fail in a row before every rank raises ``RefreshError``.
    """

    kind: str = "auto"
    count: int | None = None
    threads_per_worker: int = 1
    cpus: tuple[int, ...] | None = None
    nice: int = 0
    deadline: float | None = None
    max_restarts: int = 5
    max_failures: int = 5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"workers: kind={self.kind!r}{nearest(str(self.kind), KINDS)}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"workers: count={self.count}: must be at least 1 or None")
        for name in ("threads_per_worker", "max_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"workers: {name}={getattr(self, name)}: must be at least 1")
        for name in ("nice", "max_restarts"):
            if getattr(self, name) < 0:
                raise ValueError(f"workers: {name}={getattr(self, name)}: must be at least 0")
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"workers: deadline={self.deadline}: must be above zero seconds")
        if self.cpus is not None:
            object.__setattr__(self, "cpus", _parse_cpus(self.cpus))

    @classmethod
    def parse(cls, value: str | WorkerOptions | Mapping[str, Any]) -> WorkerOptions:
        """Take a kind, a mapping of the fields, or the options themselves."""
        if isinstance(value, WorkerOptions):
            return value
        if isinstance(value, str):
            return cls(kind=value)
        names = [field.name for field in fields(cls)]
        for key in value:
            if key not in names:
                raise ValueError(f"workers: unknown key {key!r}{nearest(key, names)}")
        return cls(**value)

    def within(self, timeout: float | None) -> WorkerOptions:
        """With a deadline, as far as it was left open, that collectives of other ranks can wait for."""
        if self.deadline is not None:
            return self
        return replace(self, deadline=_DEADLINE if timeout is None else min(_DEADLINE, timeout / 4))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this rank shares its machine with.

    Attributes:
        ranks: ranks of this run on this machine.
        trainer_cores: cores the training thread itself keeps busy: torch's threads on a CPU, one beside a GPU.
        data_workers: data loading processes of this rank.
    """

    ranks: int = 1
    trainer_cores: int = 1
    data_workers: int = 0


def choose_workers(
    options: WorkerOptions, *, cores: int, spare: int, refresh_milliseconds: float, refresh_delay: int | None
) -> tuple[str, int]:
    """The kind of workers, and how many.

    Args:
        cores, spare: of this rank, and of those what training leaves free.
        refresh_milliseconds, refresh_delay: see :func:`make_executor`.
    """
    kind = options.kind
    if kind == "auto":
        if refresh_milliseconds < _INLINE_MILLISECONDS:
            kind = "inline"
        elif refresh_delay == 0:
            kind = "deferred" if (options.count or cores) > 1 else "inline"
        else:
            kind = "process" if spare > 0 else "deferred"
    count = {"inline": 1, "deferred": cores, "thread": 1, "process": max(1, min(spare, _MOST_PROCESSES))}[kind]
    return kind, 1 if kind == "inline" else options.count or count


def make_executor(
    options: WorkerOptions, machine: Machine, *, refresh_milliseconds: float, refresh_delay: int | None
) -> tuple[Executor, str]:
    """Return the executor and the reason in words.

    Args:
        refresh_milliseconds: the estimated time of one refresh of every block this rank owns.
        refresh_delay: with 0 the step waits for the result anyway.
    """
    deadline = options.within(None).deadline or _DEADLINE
    cores = max(1, available_cores() // machine.ranks)
    spare = cores - machine.trainer_cores - machine.data_workers
    if options.kind == "process" and not hasattr(os, "memfd_create"):
        logger.warning("worker processes need Linux (memfd_create): background threads are used instead")
        options = replace(options, kind="thread")
    kind, count = choose_workers(
        options,
        cores=cores,
        spare=spare if hasattr(os, "memfd_create") else 0,
        refresh_milliseconds=refresh_milliseconds,
        refresh_delay=refresh_delay,
    )
    reason = "chosen"
    if options.kind == "auto":
        cost = f"{cores} core{'s' * (cores > 1)} to a rank, a refresh takes about {refresh_milliseconds:.1f} ms"
        if refresh_milliseconds < _INLINE_MILLISECONDS:
            reason = f"all blocks together take about {refresh_milliseconds:.1f} ms"
        elif refresh_delay == 0:
            reason = f"refresh_delay=0; {cost}"
        else:
            reason = f"{spare} of {cost}, spare" if kind == "process" else f"no core is spare: {cost}"
    if kind == "inline":
        return InlineExecutor(), f"in the step ({reason})"
    if kind == "deferred":
        words = f"all that are due at once, on {count} thread{'s' * (count > 1)} while training waits ({reason})"
        return ThreadExecutor(count, deadline, deferred=True), words
    plural = "s" if kind == "thread" else "es"
    words = f"{count} background {kind}{plural * (count > 1)} ({reason})"
    if kind == "thread":
        return ThreadExecutor(count, deadline), words
    return (
        ProcessExecutor(
            count,
            threads=options.threads_per_worker,
            deadline=deadline,
            max_restarts=options.max_restarts,
            cpus=options.cpus,
            nice=options.nice,
        ),
        words,
    )


def _parse_cpus(cpus: Sequence[int]) -> tuple[int, ...]:
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    for cpu in cpus:
        if cpu not in allowed:
            raise ValueError(f"workers: cpus={list(cpus)}: this process may use {allowed}, not {cpu}")
    if not cpus:
        raise ValueError("workers: cpus=[]: name at least one core, or None")
    return tuple(cpus)
