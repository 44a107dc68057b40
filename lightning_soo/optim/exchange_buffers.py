"""Memory through which pieces of blocks travel."""

from __future__ import annotations

import torch
from torch import Tensor


class ExchangeBuffers:
    """Keeps a CPU's buffers from step to step: the first touch of fresh pages costs more than copying into them.

    Other devices' allocators keep freed memory themselves, and may lend it to forward and backward passes meanwhile.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, purpose: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One-dimensional, of any content; what was taken for the same purpose before is lost."""
        if device.type != "cpu":
            return torch.empty(size, dtype=dtype, device=device)
        kept, needed = self._kept.get(purpose), size * dtype.itemsize
        if kept is None or kept.numel() < needed:
            kept = self._kept[purpose] = torch.empty(needed, dtype=torch.uint8)
        return kept[:needed].view(dtype)
