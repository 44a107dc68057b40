"""What a DeepSpeed engine knows beside weights and optimizer, as plain data for any stage and number of ranks."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_soo.checkpoint.sources import read_file
from lightning_soo.transport import gather_objects

FILE = "deepspeed.pt"
"""Of a checkpoint folder: schedulers and the client's state."""

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def engine_counters(engine: Any) -> dict[str, Any]:
    """Steps, samples and the loss scale; numbers alone."""
    scaler = vars(getattr(engine.optimizer, "loss_scaler", object))
    return {
        **{name: int(getattr(engine, name)) for name in _COUNTERS},
        "fp16": bool(engine.fp16_enabled()),
        "loss_scaler": {name: scaler[name] for name in _SCALE if isinstance(scaler.get(name), (int, float))},
    }


def restore_counters(engine: Any, saved: Mapping[str, Any] | None, steps: int) -> None:
    """What :func:`engine_counters` gave; the next micro-batch is the first one of a step.

    Args:
        saved: None of a checkpoint that another engine has written.
        steps: of the optimizer, for that case.
    """
    if saved is None:
        if hasattr(engine.lr_scheduler, "last_batch_iteration"):  # one of DeepSpeed's own, which count from -1
            engine.lr_scheduler.load_state_dict({"last_batch_iteration": steps - 1})
        saved = {"global_steps": steps, "global_samples": steps * engine.train_batch_size(), "skipped_steps": 0}
    for name in _COUNTERS:
        setattr(engine, name, saved[name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and saved.get("fp16") == bool(engine.fp16_enabled()):
        for name, value in saved["loss_scaler"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)


def engine_state(engine: Any, client_state: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into :data:`FILE`; whole on rank 0. Collective.

    As DeepSpeed does it, each rank's ``client_state`` at stage 3, rank 0's otherwise. What is no plain data is not in
    it, but named under ``"left_out"``.
    """
    parts = {
        "lr_scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "random_ltd": engine.random_ltd_scheduler.state_dict() if engine.random_ltd_enabled() else None,
        "data_sampler": engine.training_dataloader.data_sampler.state_dict() if _has_curriculum(engine) else None,
    }
    clients = [plain_copy(dict(client_state))]
    if engine.zero_optimization_partition_weights():
        clients = gather_objects(clients[0])
    found = {name: plain_copy(value) for name, value in {**parts, "client_states": clients}.items()}
    left_out = [name for name, value in parts.items() if value is not None and found[name] is None]
    if any(client is None for client in clients):
        left_out.append("client_state")
    return {**found, "left_out": left_out}


def read_state(folder: Path) -> dict[str, Any]:
    """What :func:`engine_state` gave; of a checkpoint that another engine has written nothing. Local.

    Raises:
        CheckpointError: the file is damaged.
    """
    return read_file(folder / FILE) if (folder / FILE).is_file() else {"client_states": [{}], "left_out": []}


def restore_state(engine: Any, saved: Mapping[str, Any], *, schedulers: bool = True) -> dict[str, Any]:
    """Give the engine what :func:`engine_state` gave; returns this rank's client state, or rank 0's.

    Args:
        schedulers: False leaves that of the learning rate as it is.
    """
    if schedulers and engine.lr_scheduler is not None and saved.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if saved.get("random_ltd") is not None and engine.random_ltd_enabled():
        engine.random_ltd_scheduler.load_state_dict(saved["random_ltd"])
    if saved.get("data_sampler") is not None and _has_curriculum(engine):
        engine.training_dataloader.data_sampler.load_state_dict(saved["data_sampler"])
    clients = saved["client_states"]
    rank = dist.get_rank()
    return dict(clients[rank if rank < len(clients) else 0] or {})


def plain_copy(value: Any) -> Any:
    """On the CPU, as ``torch.load(weights_only=True)`` will return it; None of what that refuses."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        return torch.load(buffer, map_location="cpu", weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return None


def _has_curriculum(engine: Any) -> bool:
    return engine.training_dataloader is not None and bool(engine.curriculum_learning_enabled())
