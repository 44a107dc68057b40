"""How much faster a device multiplies bfloat16 matrices than float32 ones: measured, no processor's name tells it."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

# below this the rounding is not worth it; processors with such instructions reach 2 to 16, those without stay below 1
MUCH_FASTER = 1.5
_ORDER = 512
_REPEATS = 4


@cache
def bfloat16_gain(device_type: str) -> float:
    """The rate of bfloat16 products over that of float32 ones, as torch is set up now; takes milliseconds, once.

    Args:
        device_type: ``"cpu"``, ``"cuda"`` and so on; its current device is measured. Zero where it has no such
            products, or no memory left for one: an error here would leave the other ranks waiting.
    """
    device = torch.device(device_type)
    # nothing that training draws from is used: the numbers do not matter to the time
    try:
        matrix = torch.full((_ORDER, _ORDER), 0.5, device=device)
        return _seconds(matrix) / _seconds(matrix.to(torch.bfloat16))
    except RuntimeError:
        return 0.0


def _seconds(matrix: Tensor) -> float:
    """The fastest of several products; what another process takes from one of them does not count."""
    result = torch.empty_like(matrix)
    fastest = float("inf")
    with torch.no_grad():
        for _ in range(_REPEATS):
            _wait(matrix.device)
            start = time.perf_counter()
            torch.mm(matrix, matrix, out=result)
            _wait(matrix.device)
            fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
