"""A refresh job: the name of a pure numpy function, and its arrays.

The same function gives the same bits in the trainer's process, a thread or a worker process, because it always runs
with one BLAS thread: numpy's results depend on the number.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from lightning_soo.linalg.inverse_roots import InverseRootError, inverse_root

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """``function`` is a key of :data:`FUNCTIONS`; ``options`` are plain numbers."""

    function: str
    arrays: tuple[Array, ...]
    options: Mapping[str, Any]


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


def inverse_roots(
    arrays: tuple[Array, ...], *, divisor: float, exponent: float, eps: float, relative_eps: bool
) -> tuple[tuple[Array, ...], dict[str, float]]:
    """``(A / divisor + ridge I)^(-1/exponent)`` of every array."""
    found = [
        inverse_root(np.asarray(a, np.float64) / divisor, exponent, eps=eps, relative_eps=relative_eps) for a in arrays
    ]
    return tuple(f.root for f in found), {
        "condition_number": max(f.condition_number for f in found),
        "residual": max(f.residual for f in found),
    }


FUNCTIONS: dict[str, Callable[..., tuple[tuple[Array, ...], dict[str, float]]]] = {"inverse_roots": inverse_roots}


def run_job(job: Job) -> JobResult:
    """Run a job with one BLAS thread. A numerical failure is a result, not an exception."""
    start = time.perf_counter()
    with one_blas_thread():
        try:
            arrays, diagnostics = FUNCTIONS[job.function](job.arrays, **job.options)
        except (InverseRootError, np.linalg.LinAlgError, FloatingPointError) as error:
            return JobResult(diagnostics={}, seconds=time.perf_counter() - start, error=str(error))
    return JobResult(arrays=arrays, diagnostics=diagnostics, seconds=time.perf_counter() - start)


_lock = threading.Lock()
_users = 0
_controller: ThreadpoolController | None = None
_limit: Any = None


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold numpy's BLAS at one thread while any job runs, in whatever thread; put it back after the last one.

    The setting is the process's, so users are counted: two jobs at once must not restore it under each other.
    """
    global _users, _controller, _limit
    with _lock:
        if _users == 0:
            if _controller is None:  # looks through the loaded libraries once: milliseconds
                _controller = ThreadpoolController().select(user_api="blas")
            _limit = _controller.limit(limits=1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _limit.restore_original_limits()
