"""Worker processes: roots are computed on cores of their own, and the trainer's interpreter is never held.

No thread runs in the trainer: workers are looked at when the trainer asks (once a step, and when a result is due).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning_soo
from lightning_soo.refresh.arena import Arena
from lightning_soo.refresh.jobs import Job, JobResult, one_blas_thread, run_job

logger = logging.getLogger(__name__)
_PROGRAM = Path(__file__).with_name("worker.py")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# unanswered commands a pipe may hold: far below its 64 KiB, so that writing never waits
_AHEAD = 32


@dataclass(eq=False)
class _Task:
    """A job whose arrays lie in the arena until its result is taken; so it can be run again.

    Attributes:
        number: never used twice, so that an answer to a job that was dropped is recognised.
    """

    number: int
    cost: int
    job: Job
    region: int
    command: dict[str, Any]
    worker: _Worker | None = None
    answer: dict[str, Any] | None = None


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    unread: bytes = b""
    sent: dict[int, _Task] = field(default_factory=dict)
    backlog: deque[_Task] = field(default_factory=deque)

    @property
    def load(self) -> int:
        return sum(task.cost for task in (*self.sent.values(), *self.backlog))


class ProcessExecutor:
    """Runs jobs in ``count`` worker processes.

    A worker that died is replaced and its jobs run again; one that does not answer by the deadline is killed and
    replaced. After ``max_restarts`` replacements the jobs run in the training thread, with one warning. Whoever runs
    a job runs the same function at one BLAS thread, so the bits are the same.
    """

    kind = "process"

    def __init__(
        self,
        count: int,
        *,
        threads: int = 1,
        deadline: float = 120.0,
        max_restarts: int = 5,
        cpus: Sequence[int] | None = None,
        nice: int = 0,
    ) -> None:
        """
        Args:
            threads: BLAS threads of each worker.
            deadline: seconds a result that is due is waited for.
            cpus: cores the workers are pinned to, in turn; None leaves them to the system.
            nice: lowers their priority.
        """
        self.count, self._deadline, self._max_restarts = count, deadline, max_restarts
        self._cpus, self._nice = list(cpus or ()), nice
        self._environment = {name: str(threads) for name in _THREAD_VARIABLES}
        self._arena: Arena | None = None
        self._workers: list[_Worker] = []
        self._tasks: dict[Hashable, _Task] = {}
        self._next = 0
        self._owner = os.getpid()
        self.restarts = 0
        self._finalizer: weakref.finalize[..., Any] | None = None

    @property
    def processes(self) -> list[int]:
        """Process identifiers of the workers."""
        return [worker.process.pid for worker in self._workers]

    @property
    def queued(self) -> int:
        """Jobs whose result is not known yet."""
        return sum(task.answer is None for task in self._tasks.values())

    def submit(self, key: Hashable, job: Job) -> None:
        if os.getpid() != self._owner:  # a fork must not speak to its parent's workers
            self._abandon()
        self._start()
        assert self._arena is not None
        sizes = [-(-array.nbytes // 64) * 64 for array in job.arrays]
        region = self._arena.allocate(sum(sizes) + job.result_bytes)
        offset, inputs = region, []
        for array, size in zip(job.arrays, sizes, strict=True):
            self._arena.array(offset, array.shape, array.dtype)[...] = array
            inputs.append([offset, list(array.shape), array.dtype.str])
            offset += size
        self._next += 1
        command = {
            "id": self._next,
            "function": job.function,
            "options": dict(job.options),
            "inputs": inputs,
            "output": [offset, job.result_bytes],
        }
        task = self._tasks[key] = _Task(self._next, job.cost, replace(job, arrays=()), region, command)
        self._assign(task)

    def poll(self) -> None:
        """Take what workers have answered and replace those that died. Cheap; called once a step."""
        for worker in list(self._workers):
            self._read(worker, 0.0)

    def result(self, key: Hashable) -> JobResult:
        task = self._tasks[key]
        for _ in range(2):  # the second time in a fresh worker
            limit = time.monotonic() + self._deadline
            while task.answer is None and task.worker is not None and time.monotonic() < limit:
                self._read(task.worker, limit - time.monotonic())
            if task.answer is not None or task.worker is None:
                break
            logger.warning("refresh of %s not ready %.0f s after it was needed: worker replaced", key, self._deadline)
            self._replace(task.worker)
        result = self._take(task)
        del self._tasks[key]
        if task.answer is not None or task.worker is None:  # else a worker may yet write there
            assert self._arena is not None
            self._arena.release(task.region)
        return result

    def close(self) -> None:
        self._tasks.clear()
        for worker in self._workers:
            _stop(worker.process)
        self._workers = []
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None

    def _take(self, task: _Task) -> JobResult:
        assert self._arena is not None
        if task.answer is None:  # no worker gave it
            if task.worker is not None:
                self._forget(task)
            inputs = tuple(self._arena.array(*parts) for parts in task.command["inputs"])
            with one_blas_thread:
                return run_job(replace(task.job, arrays=inputs))
        answer = task.answer
        return JobResult(
            arrays=tuple(self._arena.array(*parts).copy() for parts in answer["outputs"]),
            diagnostics=answer["diagnostics"],
            seconds=answer["seconds"],
            error=answer["error"],
        )

    def _start(self) -> None:
        if self._arena is None:
            self._arena = Arena()
            self.restarts = 0
        while len(self._workers) < self.count and self.restarts <= self._max_restarts:
            self._workers.append(self._spawn(len(self._workers)))
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _stop_all, self._workers, self._arena)

    def _spawn(self, number: int) -> _Worker:
        assert self._arena is not None
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[self._arena.descriptor],
            env={**os.environ, **self._environment},
            bufsize=0,
        )
        setup = {
            "path": [entry or os.getcwd() for entry in sys.path],
            "package": str(Path(lightning_soo.__file__).parent),
            "arena": self._arena.descriptor,
            "cpus": [self._cpus[number % len(self._cpus)]] if self._cpus else [],
            "nice": self._nice,
        }
        worker = _Worker(process)
        self._write(worker, setup)
        return worker

    def _assign(self, task: _Task) -> None:
        task.worker = min(self._workers, key=lambda worker: worker.load) if self._workers else None
        if task.worker is not None:
            task.worker.backlog.append(task)
            self._flush(task.worker)

    def _flush(self, worker: _Worker) -> None:
        assert self._arena is not None
        while worker.backlog and len(worker.sent) < _AHEAD:
            task = worker.backlog.popleft()
            worker.sent[task.number] = task
            self._write(worker, {**task.command, "size": self._arena.size})

    def _write(self, worker: _Worker, command: dict[str, Any]) -> None:
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: seen when it is read
            worker.process.stdin.write(json.dumps(command).encode() + b"\n")

    def _read(self, worker: _Worker, timeout: float) -> None:
        assert worker.process.stdout is not None
        descriptor = worker.process.stdout.fileno()
        while _is_readable(descriptor, max(0.0, timeout)):
            timeout = 0.0
            part = os.read(descriptor, 65536)
            if not part:
                self._replace(worker)
                return
            *lines, worker.unread = (worker.unread + part).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                task = worker.sent.pop(answer["id"], None) if "id" in answer else None
                if task is not None:
                    task.answer = answer
        self._flush(worker)

    def _replace(self, worker: _Worker) -> None:
        """Start another in its place and run its jobs again."""
        _stop(worker.process, kill=True)
        number = self._workers.index(worker)
        unfinished = [*worker.sent.values(), *worker.backlog]
        self.restarts += 1
        if self.restarts <= self._max_restarts:
            logger.warning(
                "worker process %d ended (%s); restart %d of at most %d",
                worker.process.pid,
                worker.process.returncode,
                self.restarts,
                self._max_restarts,
            )
            self._workers[number] = self._spawn(number)
        else:
            del self._workers[number]
            if not self._workers:
                logger.warning(
                    "worker processes ended %d times: from now on roots are computed in the training thread",
                    self.restarts,
                )
        for task in unfinished:
            self._assign(task)

    def _forget(self, task: _Task) -> None:
        assert task.worker is not None
        task.worker.sent.pop(task.number, None)
        with contextlib.suppress(ValueError):
            task.worker.backlog.remove(task)

    def _abandon(self) -> None:
        """In a fork: drop what belongs to the parent without touching its processes."""
        self._owner = os.getpid()
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        self._workers, self._tasks, self._arena = [], {}, None


def _is_readable(descriptor: int, timeout: float) -> bool:
    """Whether there is something to read, or its end, within ``timeout`` seconds. Of any number, unlike ``select``."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(math.ceil(1000 * timeout)))


def _stop(process: subprocess.Popen[bytes], kill: bool = False) -> None:
    """Close the pipe, which ends a worker within milliseconds; kill one that does not listen."""
    if kill:
        process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(timeout=2.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _stop_all(workers: list[_Worker], arena: Arena) -> None:
    for worker in workers:
        _stop(worker.process)
    arena.close()
