"""Floating-point types as users and configuration files write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_soo.naming import nearest

_BY_NAME = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_dtype(option: str, value: torch.dtype | str | None, others: Sequence[str] = ()) -> torch.dtype | None:
    """``torch.bfloat16``, ``"bfloat16"`` or ``"torch.bfloat16"``; None as it is.

    Args:
        option: what the value was given for.
        others: further choices, which the caller looks for; the error names them too.

    Raises:
        ValueError: another value, with the nearest choice.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in _BY_NAME:
        raise ValueError(f"{option}={value!r}{nearest(name, [*_BY_NAME, *others])}")
    return _BY_NAME[name]
