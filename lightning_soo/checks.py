"""Refusals that name the option, its value and what it may be."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_soo.naming import nearest


def require_whole_number(name: str, value: int | None, *, minimum: int, optional: bool = False) -> None:
    """Args:
    optional: whether None will do.

    Raises:
        ValueError: anything but a whole number of at least ``minimum``.
    """
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r}: must be a whole number of at least {minimum}{', or None' * optional}")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises:
    ValueError: a value that is none of ``choices``, with the nearest.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}{nearest(str(value), choices)}")
