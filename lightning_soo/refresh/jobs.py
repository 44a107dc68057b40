"""A refresh job: the name of a pure numpy function, and its arrays.

The same function gives the same bits in the trainer's process, a thread or a worker process, because it always runs
with one BLAS thread: numpy's results depend on the number.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
from threadpoolctl import ThreadpoolController

Array = npt.NDArray[Any]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker runs, wherever it is.

    Attributes:
        function: ``"module:function"`` of a pure numpy function ``(arrays, **options) -> (arrays, diagnostics)``; the
            module must not import torch, since a worker process imports it.
        arrays: may be views of live statistics: whoever keeps them past ``submit`` copies them.
        options: plain numbers, booleans, strings, and lists of them.
        result_bytes: at least what the resulting arrays take, each rounded up to 8.
        separate: ``"module:function"`` of ``(arrays, **options)``, which gives the options with which ``function``
            computes each array's result alone, to the same bits; None where results depend on one another. Empty:
            they may.
    """

    function: str
    arrays: tuple[Array, ...]
    options: Mapping[str, Any]
    result_bytes: int
    separate: str = ""

    @property
    def cost(self) -> int:
        """Proportional to the expected time: cubic in the order of each matrix."""
        return sum(math.prod(array.shape) * max(array.shape, default=1) for array in self.arrays)


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """``arrays`` is empty where the function failed, and ``error`` says why.

    Attributes:
        diagnostics: the worst ``condition_number`` and ``residual`` of the arrays.
        seconds: what the computation took.
    """

    arrays: tuple[Array, ...] = ()
    diagnostics: Mapping[str, float]
    seconds: float
    error: str = ""


def run_job(job: Job) -> JobResult:
    """Run a job; the caller holds BLAS at one thread. What the function raises is a result, not an exception."""
    start = time.perf_counter()
    try:
        arrays, diagnostics = find_function(job.function)(job.arrays, **job.options)
    except Exception as error:
        return JobResult(
            diagnostics=getattr(error, "diagnostics", {}),
            seconds=time.perf_counter() - start,
            error=f"{type(error).__name__}: {error}",
        )
    return JobResult(arrays=arrays, diagnostics=diagnostics, seconds=time.perf_counter() - start)


def pieces_of(job: Job) -> list[Job]:
    """A job for each array where their results do not depend on one another, else the job as it is."""
    if len(job.arrays) < 2 or not job.separate:
        return [job]
    options: list[Mapping[str, Any]] | None = find_function(job.separate)(job.arrays, **job.options)
    if options is None:
        return [job]
    return [
        replace(job, arrays=(array,), options=own, separate="") for array, own in zip(job.arrays, options, strict=True)
    ]


def join(results: Sequence[JobResult]) -> JobResult:
    """What :func:`pieces_of` a job gave, as the job itself would have given it; of several failures the first."""
    failed = next((result for result in results if result.error), None)
    if len(results) == 1 or failed is not None:
        return failed or results[0]
    return JobResult(
        arrays=tuple(array for result in results for array in result.arrays),
        diagnostics={name: max(result.diagnostics[name] for result in results) for name in results[0].diagnostics},
        seconds=sum(result.seconds for result in results),
    )


def find_function(name: str) -> Callable[..., Any]:
    """The function that ``"module:function"`` names."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


class OneBlasThread:
    """Holds numpy's BLAS at one thread from the first :meth:`acquire` to the last :meth:`release`.

    The setting is the process's, and threadpoolctl lets one thread alone change it (calls from others do nothing), so
    the training thread sets it around jobs, never the thread that runs them. numpy used by others meanwhile is slower,
    not wrong.
    """

    def __init__(self) -> None:
        self._users = 0
        self._controller: ThreadpoolController | None = None
        self._limit: Any = None

    def acquire(self) -> None:
        if self._users == 0:
            if self._controller is None:  # looks through the loaded libraries once: milliseconds
                self._controller = ThreadpoolController().select(user_api="blas")
            self._limit = self._controller.limit(limits=1)
            self._limit.__enter__()
            if any(library["num_threads"] != 1 for library in self._controller.info()):
                logger.warning("another thread controls numpy's BLAS threads: set OPENBLAS_NUM_THREADS=1")
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._limit.__exit__(None, None, None)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: object) -> None:
        self.release()


one_blas_thread = OneBlasThread()
