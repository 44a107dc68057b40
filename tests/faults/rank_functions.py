"""Job functions that workers import by name, so without torch."""

from __future__ import annotations

from typing import Any

import numpy as np


def roots_that_are_nan(arrays: tuple[Any, ...], **options: Any) -> Any:
    return tuple(np.full_like(array, np.nan) for array in arrays), {}
