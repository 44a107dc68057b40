"""What DeepSpeed must be told before it accepts an optimizer of ours, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_soo.integrations.cpu import skip_compilation
from lightning_soo.integrations.deepspeed_config import SECTION, accept_optimizer


class NumberedDevice:
    """Part of a strategy: where DeepSpeed is initialised the device has an index, which a CPU otherwise has not."""

    _numbered = False

    @property
    def root_device(self) -> torch.device:
        device: torch.device = super().root_device  # type: ignore[misc]
        return torch.device("cpu", 0) if self._numbered and device.type == "cpu" else device

    @contextmanager
    def numbered_device(self) -> Iterator[None]:
        """Lightning passes ``root_device.index`` on, and DeepSpeed compares it with 0."""
        self._numbered = True
        try:
            yield
        finally:
            self._numbered = False


def prepare_config(config: dict[str, Any]) -> None:
    """Let ``config`` accept an optimizer that is not DeepSpeed's own, offloaded or not; what it says itself stays.

    Raises:
        ValueError: the configuration builds its own optimizer, or says of second order what nobody would read.
    """
    if SECTION in config:
        raise ValueError(
            f"the DeepSpeed configuration has {SECTION!r}, which only lightning_soo.integrations.deepspeed and "
            "Accelerate read: give the strategy method=... and options={...}, or use the SecondOrder callback"
        )
    if "optimizer" in config:
        raise ValueError(
            "the DeepSpeed configuration has an 'optimizer', which cannot be taken over: remove it, and return an "
            "AdamW from configure_optimizers or give the strategy optimizer_options"
        )
    accept_optimizer(config)


def prepare_accelerator(device: torch.device) -> None:
    """Let DeepSpeed run on `device`; on a CPU nothing is compiled, which takes a minute, and for ever where an earlier
    compilation was killed.

    Raises:
        RuntimeError: DeepSpeed has chosen another kind of device, which cannot be changed any more.
    """
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if chosen != device.type:
        raise RuntimeError(
            f"DeepSpeed runs on {chosen!r} while training is to run on {device.type!r}: set the environment variable "
            f"DS_ACCELERATOR={device.type} before deepspeed is imported"
        )
    if device.type == "cpu":
        skip_compilation()
