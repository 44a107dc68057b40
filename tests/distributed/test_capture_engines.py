"""Factors summed over ranks are those of one process on the whole batch, under every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import torchrun

WORKER = Path(__file__).parent / "worker_capture.py"
TORCH = ["fsdp1", "fsdp1-flat", "fsdp2"]


def test_torch_engines_equal_one_process() -> None:
    torchrun(WORKER, 2, "ddp", "ddp:ggn", *TORCH, *(f"{name}:refused" for name in TORCH))


def test_zero_equals_one_process() -> None:
    pytest.importorskip("deepspeed")
    torchrun(WORKER, 2, "zero-1", "zero-1:ggn", "zero-2", "zero-2:ggn", "zero-3", "zero-3:refused")
