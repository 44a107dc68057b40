"""Job functions that worker processes import by name, so without torch."""

from __future__ import annotations

import os
import random
import time
from typing import Any

from lightning_soo.linalg.inverse_roots import inverse_roots


def late_roots(arrays: tuple[Any, ...], **options: Any) -> Any:
    """Roots that take their time: up to several steps, another time in every process."""
    time.sleep(random.Random(os.getpid() + time.monotonic_ns()).choice([0.0, 0.0, 0.002, 0.02]))
    return inverse_roots(arrays, **options)


def failing_roots(arrays: tuple[Any, ...], **options: Any) -> Any:
    """Fails for the largest block alone, which one rank refreshes."""
    if sum(array.shape[0] for array in arrays) == 15:
        raise ArithmeticError("as asked")
    return inverse_roots(arrays, **options)
