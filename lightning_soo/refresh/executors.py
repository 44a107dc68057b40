"""Where refresh jobs run: in the step itself, or in threads. Worker processes fit the same interface."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Hashable, Sized
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any, Protocol

from lightning_soo.refresh.jobs import Job, JobResult, join, one_blas_thread, pieces_of, run_job

logger = logging.getLogger(__name__)
_PIECES = 8  # deferred jobs of more than this part of a thread's share are cut, so that all threads end together


class Executor(Protocol):
    """Runs jobs. When a result is used is not its business: the schedule fixes that.

    Attributes:
        queued: jobs whose result is not known yet.
        restarts: workers that were replaced.
        count: workers.
    """

    kind: str
    count: int
    restarts: int

    @property
    def queued(self) -> int: ...

    def submit(self, key: Hashable, job: Job) -> None:
        """Start a job; its arrays are copied before this returns. ``key`` must not be in use."""

    def poll(self) -> None:
        """Called once a step: look after the workers."""

    def result(self, key: Hashable) -> JobResult:
        """Return a job's result, waiting for it if need be, and forget the job."""

    def close(self) -> None:
        """Stop; unfinished jobs are dropped. A later ``submit`` starts afresh."""


class InlineExecutor:
    """Runs each job where it is submitted: the training step waits."""

    kind = "inline"
    count = 1

    def __init__(self) -> None:
        self._results: dict[Hashable, JobResult] = {}
        self.restarts = 0

    @property
    def queued(self) -> int:
        return 0

    def submit(self, key: Hashable, job: Job) -> None:
        with one_blas_thread:
            self._results[key] = run_job(job)

    def poll(self) -> None:
        pass

    def result(self, key: Hashable) -> JobResult:
        return self._results.pop(key)

    def close(self) -> None:
        self._results.clear()


class _Parts:
    """The futures of a job: one, or one for each of its pieces."""

    def __init__(self) -> None:
        self._futures: list[Future[JobResult]] = []

    def add(self) -> Future[JobResult]:
        self._futures.append(Future())
        return self._futures[-1]

    def done(self) -> bool:
        return bool(self._futures) and all(future.done() for future in self._futures)

    def cancel(self) -> None:
        for future in self._futures:
            future.cancel()

    def result(self, timeout: float) -> JobResult:
        """Raises: concurrent.futures.TimeoutError: a piece is not ready after ``timeout`` seconds."""
        if wait(self._futures, timeout=timeout).not_done:
            raise FutureTimeoutError
        return join([future.result() for future in self._futures])


class ThreadExecutor:
    """Daemon threads. LAPACK as numpy calls it releases the GIL, so training goes on while a root is computed.

    Each job runs at one BLAS thread whatever their number, so the bits do not depend on it.

    Deferred jobs wait until the first result is asked for; then all that have come run at once, on every thread, while
    training waits. Where training itself uses all cores that is the cheaper way: products of several threads wait for
    the slowest, so a job beside them costs several times its own time (two cores: 1.3 s in place of 0.5 s). Jobs that
    are large beside the rest are cut into their matrices then, so that no thread works while the others have ended.
    """

    def __init__(self, count: int = 1, deadline: float = 120.0, *, deferred: bool = False) -> None:
        """Args: deadline: seconds to wait for a late result before computing it in the calling thread instead."""
        self.kind = "deferred" if deferred else "thread"
        self.count = count
        self._deadline = deadline
        self._waiting: list[tuple[_Parts, Job]] = []  # deferred, and no result asked for yet
        self._queue: queue.SimpleQueue[tuple[Future[JobResult], Job] | None] = queue.SimpleQueue()
        self._pending: dict[Hashable, tuple[_Parts, Job]] = {}
        self._threads: list[threading.Thread] = []
        self._finalizer: weakref.finalize[..., Any] | None = None
        self.restarts = 0

    @property
    def queued(self) -> int:
        return sum(not parts.done() for parts, _ in self._pending.values())

    def poll(self) -> None:
        pass

    def submit(self, key: Hashable, job: Job) -> None:
        if not self._threads:
            self._queue = queue.SimpleQueue()
            self._threads = [
                threading.Thread(target=_work, args=(self._queue,), name=f"lightning_soo refresh {number}", daemon=True)
                for number in range(self.count)
            ]
            for thread in self._threads:
                thread.start()
            # of an optimizer that is dropped without close()
            self._finalizer = weakref.finalize(self, _end, self._queue, self.count, self._pending)
            self._finalizer.atexit = False
        one_blas_thread.acquire()
        job = replace(job, arrays=tuple(array.copy() for array in job.arrays))
        parts = _Parts()
        self._pending[key] = parts, job
        if self.kind == "deferred":
            self._waiting.append((parts, job))
        else:
            self._queue.put((parts.add(), job))

    def result(self, key: Hashable) -> JobResult:
        if self._waiting:
            self._run_waiting()
        parts, job = self._pending.pop(key)
        try:
            return parts.result(self._deadline)
        except FutureTimeoutError:
            logger.warning(
                "refresh of %s not ready %.0f s after it was needed: computed in the training thread instead",
                key,
                self._deadline,
            )
            return run_job(job)  # the same function at one BLAS thread: the same bits
        finally:
            one_blas_thread.release()

    def _run_waiting(self) -> None:
        """Run all deferred jobs and wait for them: none is left beside training."""
        waiting, self._waiting = self._waiting, []
        share = sum(job.cost for _, job in waiting) / self.count
        started = [
            (parts.add(), piece)
            for parts, job in waiting
            for piece in (pieces_of(job) if self.count > 1 and job.cost > share / _PIECES else [job])
        ]
        for item in sorted(started, key=lambda item: -item[1].cost):  # the longest first
            self._queue.put(item)
        wait([future for future, _ in started], timeout=self._deadline)

    def close(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        unfinished = len(self._pending)
        for parts, _ in self._pending.values():
            parts.cancel()
        self._pending.clear()
        self._waiting.clear()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=self._deadline)
        self._threads = []
        for _ in range(unfinished):
            one_blas_thread.release()


def _end(jobs: queue.SimpleQueue[Any], threads: int, pending: Sized) -> None:
    """Let threads go, and whatever the unfinished jobs have held."""
    for _ in range(threads):
        jobs.put(None)
    for _ in range(len(pending)):
        one_blas_thread.release()


def _work(jobs: queue.SimpleQueue[tuple[Future[JobResult], Job] | None]) -> None:
    while (item := jobs.get()) is not None:
        future, job = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(run_job(job))
        except BaseException as error:  # a fault of ours: raised where the result is asked for, never swallowed
            future.set_exception(error)
