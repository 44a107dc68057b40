"""Which executor: the user's choice, or one from the cost of the blocks and the cores of this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_soo.naming import nearest
from lightning_soo.refresh.executors import Executor, InlineExecutor, ThreadExecutor

KINDS = ("auto", "inline", "thread")


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How roots are computed.

    Attributes:
        kind: ``"inline"`` (in the step), ``"thread"`` (background threads) or ``"auto"``.
        count: how many threads; None is one, or all cores of this process where the step waits for them anyway
            (``refresh_delay=0``). The result is the same, bit for bit.
        deadline: seconds a late result is waited for before the training thread computes it itself.
        max_failures: refreshes of one block that may fail in a row before every rank raises ``RefreshError``.
    """

    kind: str = "auto"
    count: int | None = None
    deadline: float = 300.0
    max_failures: int = 5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"workers: kind={self.kind!r}{nearest(str(self.kind), KINDS)}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"workers: count={self.count}: must be at least 1 or None")
        if not self.deadline > 0:
            raise ValueError(f"workers: deadline={self.deadline}: must be above zero seconds")
        if self.max_failures < 1:
            raise ValueError(f"workers: max_failures={self.max_failures}: must be at least 1")

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


def make_executor(
    options: WorkerOptions, *, refresh_milliseconds: float, refresh_delay: int, ranks_on_this_machine: int
) -> tuple[Executor, str]:
    """Return the executor and the reason in words.

    Args:
        refresh_milliseconds: the estimated time of one refresh of every block this rank owns.
        refresh_delay: with 0 the step waits for the result anyway.
        ranks_on_this_machine: they share its cores.
    """
    cores = max(1, cores_of_this_process() // ranks_on_this_machine)
    count = options.count or (cores if refresh_delay == 0 else 1)
    threads = f"{count} thread{'s' * (count > 1)}"
    if options.kind == "inline":
        return InlineExecutor(), "inline (chosen)"
    if options.kind == "thread":
        return ThreadExecutor(count, options.deadline), f"{threads} (chosen)"
    if refresh_milliseconds < 2.0:
        return InlineExecutor(), f"inline: a refresh of every block takes about {refresh_milliseconds:.1f} ms"
    share = f"{cores} core{'s' * (cores > 1)} to a rank"
    cost = f"{share}; a refresh of every block takes about {refresh_milliseconds:.0f} ms"
    if refresh_delay > 0:
        return ThreadExecutor(count, options.deadline), f"{threads} in the background ({cost})"
    if count == 1:
        return InlineExecutor(), f"inline: refresh_delay=0 ({cost})"
    return ThreadExecutor(count, options.deadline), f"{threads} while the step waits, refresh_delay=0 ({cost})"


def cores_of_this_process() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
