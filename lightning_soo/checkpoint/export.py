"""A checkpoint as torch's own optimizers know it: weights, and the state of an AdamW or an SGD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_soo.checkpoint.inspection import open_checkpoint
from lightning_soo.checkpoint.pieces import Piece, whole
from lightning_soo.checkpoint.sources import MemorySource, Source

_ADAMW: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_SGD: dict[str, Any] = {
    "lr": 1e-3,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}


@dataclass
class Export:
    """
    Attributes:
        state_dict: the model's weights and buffers by name.
        optimizers: of each optimizer what ``load_state_dict`` of ``kinds`` takes.
        kinds: ``"AdamW"`` or ``"SGD"``, for each optimizer.
        anew: parameters whose moments start anew -> why.
    """

    state_dict: dict[str, Tensor]
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    anew: dict[str, str] = field(default_factory=dict)


def export(path: str | Path) -> Export:
    """Read a checkpoint of ours, folder or file, into memory.

    Raises:
        CheckpointError: damaged, or no checkpoint.
    """
    source = open_checkpoint(path)
    prefixes = ("model/",) if isinstance(source, MemorySource) else ("model/", "buffer/")
    weights = {key.split("/", 1)[1]: key for key in source.arrays if key.startswith(prefixes)}
    values = _read(source, list(weights.values()))
    found = Export({name: values[key] for name, key in weights.items()})
    for number, content in enumerate(source.content["optimizers"]):
        _optimizer(found, source, number, content)
    return found


def _optimizer(found: Export, source: Source, number: int, content: Mapping[str, Any]) -> None:
    prefix = f"optimizer.{number}/moment/"
    fields: dict[str, dict[str, str]] = {}
    for key in source.arrays:
        if key.startswith(prefix):
            name, moment = key.removeprefix(prefix).rsplit("/", 1)
            fields.setdefault(name, {})[moment] = key
    adamw = any({"exp_avg", "exp_avg_sq"} <= set(moments) for moments in fields.values())
    needed = ("exp_avg", "exp_avg_sq") if adamw else ("momentum_buffer",)
    defaults = _ADAMW if adamw else _SGD
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, saved in enumerate(content["groups"]):
        names = [name for name, row in content["parameters"].items() if row["group"] == index]
        first = sum(len(group["params"]) for group in groups)
        options = {name: saved.get(name, default) for name, default in defaults.items()}
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        numbers = list(range(first, first + len(names)))
        groups.append({**options, "params": numbers, "param_names": names})
        for place, name in zip(numbers, names, strict=True):
            moments = fields.get(name, {})
            if not set(needed) <= set(moments):
                missing = ", ".join(sorted(set(needed) - set(moments)))
                found.anew[name] = f"the checkpoint has no {missing} of it"
                continue
            values = _read(source, [moments[one] for one in needed])
            state[place] = {one: values[moments[one]] for one in needed}
            if adamw:
                state[place]["step"] = torch.tensor(float(content["state"].get(name, {}).get("step", 0.0)))
    found.optimizers.append({"state": state, "param_groups": groups})
    found.kinds.append("AdamW" if adamw else "SGD")


def _read(source: Source, keys: Sequence[str]) -> dict[str, Tensor]:
    values = {key: torch.empty(source.arrays[key].shape, dtype=source.arrays[key].torch_dtype) for key in keys}
    pieces: list[Piece] = [whole(key, value) for key, value in values.items()]
    source.check(pieces)
    source.read(pieces)
    return values
