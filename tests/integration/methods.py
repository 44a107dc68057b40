"""Configurations that the doors are tested with, and what must not pass silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "shampoo": {
        "method": "shampoo",
        "precondition_frequency": 3,
        "start_preconditioning_step": 2,
        "preconditioner_eps": 1e-3,
    },
    "kfac": {"method": "kfac", "statistics_frequency": 1, "precondition_frequency": 2, "damping": 1e-2},
}


def refused(words: str, attempt: Callable[[], Any]) -> None:
    """``attempt`` fails and its message has ``words``; checked on every rank."""
    try:
        attempt()
    except (RuntimeError, TypeError, ValueError) as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")
