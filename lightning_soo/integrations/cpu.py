"""Accelerate's engines on CPUs: for tests, and for trying a launch before a GPU is there."""

from __future__ import annotations

import os
from typing import Any

DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"


def is_asked_for() -> bool:
    """Whether ``ACCELERATE_TORCH_DEVICE=cpu`` is set, which Accelerate itself takes as the device."""
    return os.environ.get(DEVICE_VARIABLE) == "cpu"


def train_on_cpu() -> None:
    """Let several processes train together on CPUs under DDP, FSDP and DeepSpeed; call it before ``Accelerator()``.

    Accelerate looks for accelerators to decide whether processes are connected, and for DDP on CPUs starts only one
    (``MULTI_CPU``). With this a launch configuration of ``MULTI_GPU``, ``FSDP`` or ``DEEPSPEED`` is what it says, over
    gloo. ``lightning_soo.launch`` calls it where ``ACCELERATE_TORCH_DEVICE=cpu`` is set.
    """
    os.environ[DEVICE_VARIABLE] = "cpu"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from accelerate.state import DistributedType, PartialState

    original = PartialState._prepare_backend
    if hasattr(original, "on_cpu"):
        return

    def prepare_backend(self: Any, cpu: bool = False, *args: Any, **options: Any) -> Any:
        if int(os.environ.get("LOCAL_RANK", -1)) == -1:
            return original(self, cpu, *args, **options)
        if _uses("DEEPSPEED"):
            skip_compilation()
        # what FSDP and DeepSpeed are made from; plain, it would put the model on a GPU
        sharded = _uses("FSDP") or _uses("DEEPSPEED")
        return "gloo", DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU

    prepare_backend.on_cpu = True  # type: ignore[attr-defined]
    PartialState._prepare_backend = prepare_backend


def skip_compilation() -> None:
    """Spare DeepSpeed on CPUs an operation of its own, whose compilation takes a minute; call it before processes are
    connected. Reductions go through gloo all the same."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _uses(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"
