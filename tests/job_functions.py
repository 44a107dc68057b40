"""Job functions that misbehave, imported by worker processes by name."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import numpy as np


def double(arrays: tuple[Any, ...], **_: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    return tuple(2.0 * array for array in arrays), {"condition_number": 1.0, "residual": 0.0}


def slow(arrays: tuple[Any, ...], *, seconds: float) -> tuple[tuple[Any, ...], dict[str, float]]:
    time.sleep(seconds)
    return double(arrays)


def slow_elsewhere(arrays: tuple[Any, ...], *, seconds: float) -> tuple[tuple[Any, ...], dict[str, float]]:
    """Slow in a background thread, quick in the thread that trains."""
    if threading.current_thread() is not threading.main_thread():
        time.sleep(seconds)
    return double(arrays)


def spin(arrays: tuple[Any, ...], *, seconds: float) -> tuple[tuple[Any, ...], dict[str, float]]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        np.linalg.eigh(arrays[0] + arrays[0].T)
    return double(arrays)


def die(arrays: tuple[Any, ...], **_: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    """Ends a worker process, never the trainer: only there this package is a stub without its own version."""
    if hasattr(sys.modules["lightning_soo"], "__version__"):
        return double(arrays)
    os._exit(3)


def fail(arrays: tuple[Any, ...], **_: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    raise RuntimeError("as asked")


def not_finite(arrays: tuple[Any, ...], **_: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    return tuple(np.full_like(array, np.nan) for array in arrays), {}


def wrong_shape(arrays: tuple[Any, ...], **_: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    return tuple(array[:-1] for array in arrays), {}


def too_large(arrays: tuple[Any, ...], **_: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    return tuple(np.concatenate([array] * 4) for array in arrays), {}


def noisy(arrays: tuple[Any, ...], **_: Any) -> tuple[tuple[Any, ...], dict[str, float]]:
    print("printed by a job function")
    return double(arrays)
