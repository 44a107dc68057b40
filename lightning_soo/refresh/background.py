"""Jobs on tensors that may be on a device: copied to the host beside training, then given to an executor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from torch import Tensor

from lightning_soo.refresh.device_copies import DeviceCopies, HostCopy
from lightning_soo.refresh.executors import Executor
from lightning_soo.refresh.jobs import Job, JobResult

Key = tuple[Hashable, int]


class Background:
    """An executor, made when the first job comes, and the copies that lead to it."""

    def __init__(self, make_executor: Callable[[], Executor]) -> None:
        self._make_executor = make_executor
        self._executor: Executor | None = None
        self.copies = DeviceCopies()
        self._copying: dict[Key, tuple[HostCopy, Job]] = {}
        self._done: dict[Key, JobResult] = {}

    @property
    def executor(self) -> Executor:
        if self._executor is None:
            self._executor = self._make_executor()
        return self._executor

    @property
    def restarts(self) -> int:
        return 0 if self._executor is None else self._executor.restarts

    def choose_again(self, make_executor: Callable[[], Executor]) -> None:
        """Other workers from now on, where another kind or number is right; no result may be outstanding."""
        self._make_executor = make_executor
        if self._executor is None:
            return
        other = make_executor()
        if (other.kind, other.count) != (self._executor.kind, self._executor.count):
            self.close()
            self._executor = other

    def submit(self, key: Key, job: Job, tensors: Sequence[Tensor]) -> None:
        """Start a job on ``tensors`` as they are now; on a device it starts when their copy has arrived.

        Args:
            key: its first part names the memory that the copy uses again.
            job: without arrays.
        """
        copy = self.copies.to_host(key[0], tensors)
        if copy.ready():
            self._start(key, copy, job)
        else:
            self._copying[key] = copy, job

    def keep(self, key: Key, result: JobResult) -> None:
        """Take a result that needed no job: it was computed where its tensors are."""
        self._done[key] = result

    def fence(self) -> None:
        """To be called before submitted tensors are changed in place: only the device waits for their copies."""
        for copy, _ in self._copying.values():
            copy.fence()

    def poll(self) -> None:
        """Pass on what has arrived. Never waits."""
        for key, (copy, job) in list(self._copying.items()):
            if copy.ready():
                del self._copying[key]
                self._start(key, copy, job)
        if self._executor is not None:
            self._executor.poll()

    def result(self, key: Key) -> JobResult:
        """The result of a job, waited for if need be."""
        if key in self._done:
            return self._done.pop(key)
        waiting = self._copying.pop(key, None)
        if waiting is not None:
            self._start(key, *waiting)
        return self.executor.result(key)

    def close(self) -> None:
        """Drop all jobs and stop the workers; the next job starts new ones."""
        self._copying.clear()
        self._done.clear()
        if self._executor is not None:
            self._executor.close()

    def _start(self, key: Key, copy: HostCopy, job: Job) -> None:
        self.executor.submit(key, replace(job, arrays=tuple(tensor.detach().numpy() for tensor in copy.wait())))
