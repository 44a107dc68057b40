"""Fabric's checkpoints as folders that any strategy here reads, at any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.parallel import ParallelStrategy
from torch import nn

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.preconditioners import PRECONDITIONERS, collect_preconditioners, restore_preconditioners
from lightning_soo.checkpoint.sources import load_plain, read_file
from lightning_soo.checkpoint_folders import load_checkpoint, save_checkpoint
from lightning_soo.optim.base import SecondOrderOptimizer

REST_FILE = "rest.pt"
"""What a script has saved beside its model and its optimizers."""


class FabricCheckpoints(ParallelStrategy):
    """Saves and loads what ``fabric.save`` and ``fabric.load`` are given.

    Attributes:
        portable_checkpoints: whether checkpoints that would be folders are written as ours, not as the engine's.
    """

    portable_checkpoints: bool = True
    second_order_optimizers: list[SecondOrderOptimizer]
    # whether the engine saves optimizer.state_dict() as it is, with everything we put into it
    preconditioners_travel_with_optimizer = False

    @property
    def writes_folders(self) -> bool:
        """Whether the engine would write a folder."""
        return False

    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        model, optimizers = _objects(state)
        further = any(one is not None for one in (*args, *kwargs.values()))  # a filter, storage options
        if self.writes_folders and self.portable_checkpoints and model is not None and optimizers and not further:
            taken = (model, *optimizers)
            rest = {
                name: value.state_dict() if hasattr(value, "state_dict") else value
                for name, value in state.items()
                if not any(value is one for one in taken)
            }
            save_checkpoint(
                store.local_path(self.broadcast(path)),
                model,
                optimizers,
                files=lambda unfinished: torch.save(rest, unfinished / REST_FILE),
            )
            return
        super().save_checkpoint(path, self.with_preconditioners(state), *args, **kwargs)

    def with_preconditioners(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What is to be saved, and what the engine does not save with its optimizers. Collective."""
        if not self.second_order_optimizers or self.preconditioners_travel_with_optimizer:
            return dict(state)
        saved = collect_preconditioners(self.second_order_optimizers, self.is_global_zero)
        return {**state, PRECONDITIONERS: saved}

    def load_checkpoint(self, path: Any, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trusts = kwargs.get("weights_only", args[1] if len(args) > 1 else None)  # after strict
        if isinstance(path, (str, Path)) and "://" not in str(path) and store.is_store(path):
            return self._load_folder(Path(self.broadcast(path)), state, trusts)
        if isinstance(path, (str, Path)) and Path(path).is_file() and isinstance(state, dict):
            _check_file(Path(path), state, trusts)
        rest = super().load_checkpoint(path, state, *args, **kwargs)
        if self.second_order_optimizers and not self.preconditioners_travel_with_optimizer:
            # where each rank reads a file of its own, only rank 0's holds them
            saved = self.broadcast(rest.pop(PRECONDITIONERS, None))
            ours, asked = self.second_order_optimizers, _objects(state)[1] if isinstance(state, dict) else []
            inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in asked]
            chosen = [number for number, one in enumerate(ours) if one in inner]
            if saved is not None and len(chosen) < len(ours):  # weights alone, or some of several
                saved = [saved[number] for number in chosen]
            restore_preconditioners([ours[number] for number in chosen], saved)
        return rest

    def _load_folder(self, folder: Path, state: Any, weights_only: bool | None = None) -> dict[str, Any]:
        given = {"model": state} if isinstance(state, nn.Module) else state or {}
        model, optimizers = _objects(given)
        if model is None:
            raise ValueError(f"{folder} is loaded into a model: fabric.load(path, {{'model': model, ...}})")
        kept = store.find(folder) / REST_FILE
        rest: dict[str, Any] | None = None
        with suppress(OSError, RuntimeError):  # what is damaged is found by its checksum, and named
            rest = load_plain(kept, weights_only=weights_only)
        load_checkpoint(folder, model, optimizers)
        if rest is None:
            rest = load_plain(kept, weights_only=weights_only)
        for name, value in given.items():
            if value is model or any(value is one for one in optimizers) or name not in rest:
                continue
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(rest.pop(name))
            else:
                given[name] = rest.pop(name)
        return rest


def _check_file(path: Path, state: Mapping[str, Any], weights_only: bool | None = None) -> None:
    """Before Fabric loads one thing after the other.

    Raises:
        CheckpointError: damaged, or the state of an optimizer that does not fit.
    """
    saved = read_file(path, weights_only)
    for name, value in state.items():
        if isinstance(value, SecondOrderOptimizer) and not value.is_sharded and name in saved:
            value.check_state_dict(saved[name])


def _objects(state: Mapping[str, Any]) -> tuple[nn.Module | None, list[Any]]:
    """The model and the second-order optimizers of what is saved; no model where there are several."""
    models = [value for value in state.values() if isinstance(value, nn.Module)]
    inner = [(value, getattr(value, "optimizer", value)) for value in state.values()]  # DeepSpeed wraps it
    optimizers = [value for value, one in inner if isinstance(one, SecondOrderOptimizer)]
    return (models[0] if len(models) == 1 else None), optimizers
