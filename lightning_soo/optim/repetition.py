"""The same loss once more: with the random numbers of the first time, and as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Where torch's generators (of the CPU and of one device), Python's and numpy's stand."""

    cpu: Tensor
    device: torch.device
    accelerator: Tensor | None
    python: Any
    numpy: Any

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        accelerator = None
        if device.type != "cpu":
            accelerator = torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), device, accelerator, random.getstate(), np.random.get_state())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextmanager
def repeating(state: RandomState, buffers: Iterable[Tensor]) -> Iterator[None]:
    """Compute with the random numbers of ``state``; afterwards generators and buffers are as before.

    Dropout masks are those of the first time. Running statistics (BatchNorm) do not count a batch twice, while the
    batch's own, which a loss in training mode depends on, are computed from the same batch.
    """
    now = RandomState.capture(state.device)
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    state.restore()
    try:
        yield
    finally:
        now.restore()
        for buffer, value in kept:
            buffer.data.copy_(value)  # without a new version: a graph may have saved it
