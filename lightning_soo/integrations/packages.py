"""Packages that a front door cannot do without, asked for before it opens."""

from __future__ import annotations

import importlib


def require_accelerate(purpose: str) -> None:
    """
    Raises:
        ImportError: Accelerate, or something that it needs, is missing; says what it was for.
    """
    try:
        importlib.import_module("accelerate")
    except ImportError as error:
        raise ImportError(f"{purpose} needs Accelerate: pip install accelerate ({error})") from None
