"""A Trainer's checkpoints as folders that any strategy here reads, and files of the others read just as well."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.preconditioners import (
    PRECONDITIONERS,
    collect_preconditioners,
    join_preconditioners,
    restore_preconditioners,
)
from lightning_soo.checkpoint.sources import FolderSource, Source, read_file, single_file
from lightning_soo.checkpoint_folders import check_checkpoint, load_checkpoint, save_checkpoint
from lightning_soo.integrations.trainer_checkpoints import TRAINER_FILE, read_trainer_file
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.placement.fragments import canonical_name

_LOADED = "lightning_soo_loaded"  # weights and optimizers are in place
_OURS = ("state_dict", "optimizer_states", PRECONDITIONERS)


class PortableCheckpoints(ParallelStrategy):
    """Saves and loads checkpoints of any number of ranks and any strategy.

    Attributes:
        portable_checkpoints: whether checkpoints that would be folders are written as ours, not as the engine's.
        asynchronous_checkpoints: whether these are written while training goes on.
        adopt: whether a checkpoint of a torch optimizer is taken: its moments go on, preconditioners start anew.
    """

    portable_checkpoints: bool = True
    asynchronous_checkpoints: bool = False
    adopt: bool = False
    second_order_optimizers: list[SecondOrderOptimizer]
    # whether the engine saves optimizer.state_dict() as it is, with everything we put into it
    preconditioners_travel_with_optimizer = False
    _saver: store.BackgroundSaver | None = None

    @property
    def writes_folders(self) -> bool:
        """Whether the engine would write a folder."""
        return False

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights and optimizers are loaded together, or not at all."""
        return True

    def engine_state(self) -> dict[str, Any]:
        """What the engine itself counts: plain data, saved with the optimizers."""
        return {}

    def restore_engine_state(self, saved: Mapping[str, Any]) -> None:
        """After the optimizers were loaded; ``saved`` is what :meth:`engine_state` of any engine gave."""

    # Lightning calls all of these on every rank

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._is_fitting and self.writes_folders and self.portable_checkpoints and self.second_order_optimizers:
            return {}  # each rank writes its own part instead
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        inner = getattr(optimizer, "_optimizer", optimizer)
        if self.writes_folders and self.portable_checkpoints and self.second_order_optimizers:
            return {}
        if self.preconditioners_travel_with_optimizer and isinstance(inner, SecondOrderOptimizer):
            inner.consolidate(to=0)
        return super().optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        ours = self.second_order_optimizers
        if self.writes_folders and self.portable_checkpoints and ours and storage_options is None:
            self._save_folder(checkpoint, store.local_path(self.broadcast(filepath)))
            return
        if "optimizer_states" in checkpoint and not self.preconditioners_travel_with_optimizer:
            saved = collect_preconditioners(ours, self.is_global_zero)
            if saved:
                checkpoint[PRECONDITIONERS] = saved
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _save_folder(self, checkpoint: Mapping[str, Any], folder: Path) -> None:
        assert self.model is not None
        rest = {name: value for name, value in checkpoint.items() if name not in _OURS}
        if self.asynchronous_checkpoints:
            self._saver = self._saver or store.BackgroundSaver()
            rest = deepcopy(rest)  # written while callbacks and loops go on
        with_optimizers = "optimizer_states" in checkpoint
        save_checkpoint(
            folder,
            self.model,
            self.second_order_optimizers if with_optimizers else (),
            extra=self.engine_state() if with_optimizers else {},
            background=self._saver,
            files=lambda unfinished: torch.save(rest, unfinished / TRAINER_FILE),
        )

    def remove_checkpoint(self, filepath: Any) -> None:
        if self._saver is not None:
            self._saver.wait()  # an old one goes when the new one is complete
        super().remove_checkpoint(filepath)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._saver is not None:
            self._saver.wait()
        path = Path(self.broadcast(checkpoint_path))
        trusts = kwargs.get("weights_only", args[0] if args else None)
        if store.is_store(path):
            return self._take(FolderSource(path), read_trainer_file(path, trusts))
        if path.is_file() and self.second_order_optimizers:
            whole = read_file(path, trusts)
            names = [optimizer.parameter_names() for optimizer in self.second_order_optimizers]
            source = single_file(path, whole, self._aliases(), names)
            if not self.preconditioners_travel_with_optimizer:
                return self._take(source, whole)
            if self._is_fitting:  # Lightning hands it out, so that the module's hook may change it
                assert self.model is not None
                check_checkpoint(source, self.model, self.second_order_optimizers, strict_weights=False)
        checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if self.preconditioners_travel_with_optimizer:
            join_preconditioners(checkpoint)
        if self._is_fitting and self.second_order_optimizers and not self.preconditioners_travel_with_optimizer:
            # where each rank reads a file of its own, only rank 0's holds them
            saved = self.broadcast(checkpoint.pop(PRECONDITIONERS, None))
            restore_preconditioners(self.second_order_optimizers, saved)
        return checkpoint

    def _take(self, source: Source, rest: Mapping[str, Any]) -> dict[str, Any]:
        assert self.model is not None and self.lightning_module is not None
        optimizers = self.second_order_optimizers if self._is_fitting else ()
        strict = self.lightning_module.strict_loading
        _, saved = load_checkpoint(source, self.model, optimizers, strict_weights=strict)
        if self._is_fitting:
            self.restore_engine_state(saved)
        kept = {name: value for name, value in rest.items() if name not in _OURS}
        return {**kept, "state_dict": {}, "optimizer_states": [], _LOADED: True}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not checkpoint.get(_LOADED):
            super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if not checkpoint.get(_LOADED):
            super().load_optimizer_state_dict(checkpoint)

    def teardown(self) -> None:
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        super().teardown()

    @property
    def _is_fitting(self) -> bool:
        module = self.lightning_module
        return module is not None and module.trainer.state.fn == TrainerFn.FITTING

    def _aliases(self) -> set[str]:
        """Names of parameters that are known by another name: tied weights."""
        module = self.lightning_module
        assert module is not None
        every = {canonical_name(name) for name, _ in module.named_parameters(remove_duplicate=False)}
        return every - {canonical_name(name) for name, _ in module.named_parameters()}
