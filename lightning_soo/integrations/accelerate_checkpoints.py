"""``accelerator.save_state`` and ``load_state`` of one Accelerator: from any number of processes to any other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.integrations.accelerate_state import (
    Part,
    check_parts,
    has_parts,
    load_parts,
    load_preconditioners,
    parts_of,
    refuse_first_order,
    save_parts,
    save_preconditioners,
    without,
)
from lightning_soo.optim.base import SecondOrderOptimizer

_LOADED_BY_ENGINES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class AcceleratorCheckpoints:
    """Weights and optimizers go through a checkpoint folder of ours, ``second_order``; all else is Accelerate's.

    Its own files of the weights are written too, for others to read. Folders without ours are read as Accelerate
    reads them.

    Args:
        accelerator: an ``accelerate.Accelerator``, whose two methods are replaced.
        optimizers: the second-order ones that are prepared at the time of the call.
    """

    def __init__(self, accelerator: Any, optimizers: Callable[[], list[SecondOrderOptimizer]]) -> None:
        self._accelerator, self._optimizers = accelerator, optimizers
        self._saving: list[Part] | None = None
        self._loading: list[Part] | None = None
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: self._write(folder))
        accelerator.register_load_state_pre_hook(lambda models, folder: self._read(folder))
        self._save_state, self._load_state = accelerator.save_state, accelerator.load_state
        accelerator.save_state, accelerator.load_state = self.save_state, self.load_state

    def save_state(self, *arguments: Any, **options: Any) -> Any:
        """``accelerator.save_state``: moments are written once, in our folder. Collective."""
        self._saving = self._parts()
        try:
            with without(self._accelerator, *(["_optimizers"] if self._saving else [])):
                return self._save_state(*arguments, **options)
        finally:
            self._saving = None

    def load_state(self, input_dir: Any = None, *arguments: Any, **options: Any) -> None:
        """``accelerator.load_state``; what cannot be loaded is refused before anything has changed. Collective.

        Raises:
            CheckpointError: damaged, incomplete, or of another model or method; on every rank.
        """
        folder, parts = self._newest() if input_dir is None else Path(input_dir).expanduser(), self._parts()
        if folder is None or not folder.is_dir() or not has_parts(folder):
            if folder is not None and folder.is_dir() and self._optimizers():
                refuse_first_order(self._accelerator, folder, self._optimizers())
            self._load_state(input_dir, *arguments, **options)
            return
        if parts is None:
            raise CheckpointError(
                f"{folder} was saved with every optimizer's parameters in one model; here some are in several models, "
                "or in none: prepare the models and optimizers that it was saved with"
            )
        strict = bool(options.get("strict", options.get("load_module_strict", True)))
        check_parts(parts, folder, strict=strict)
        self._loading = parts
        # the user's hooks see the models, where Accelerate shows them at all; ours comes after them
        shown = self._accelerator.distributed_type not in _LOADED_BY_ENGINES
        last = self._accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        try:
            with without(self._accelerator, "_optimizers", *([] if shown else ["_models"])):
                self._load_state(str(folder), *arguments, **options)
        finally:
            self._loading = None
            last.remove()
        saved = load_parts(parts, folder, strict=strict)
        self._count(saved.get("accelerate", {}))

    def _parts(self) -> list[Part] | None:
        optimizers = self._optimizers()
        return parts_of(self._accelerator._models, optimizers) if optimizers else None

    def _write(self, folder: str) -> None:
        """While Accelerate saves, on every rank."""
        if self._saving is None:
            save_preconditioners(self._accelerator, self._optimizers(), folder)
            return
        steps, accumulation = self._accelerator.step, self._accelerator.gradient_accumulation_steps
        save_parts(self._saving, folder, {"accelerate": {"step": steps, "gradient_accumulation_steps": accumulation}})

    def _read(self, folder: str) -> None:
        """While Accelerate loads, on every rank."""
        if self._loading is None:
            load_preconditioners(self._accelerator, self._optimizers(), folder)

    def _count(self, saved: dict[str, int]) -> None:
        """Micro-batches since the last step, which Accelerate has in files of single ranks."""
        same = saved.get("gradient_accumulation_steps") == self._accelerator.gradient_accumulation_steps
        self._accelerator.step = saved["step"] if same else 0

    def _newest(self) -> Path | None:
        """What ``load_state()`` means with ``automatic_checkpoint_naming``."""
        accelerator = self._accelerator
        parent = Path(accelerator.project_dir or "", "checkpoints")
        if not accelerator.project_configuration.automatic_checkpoint_naming or not parent.is_dir():
            return None
        return max(
            (parent / name for name in os.listdir(parent)),
            key=lambda path: int(re.findall(r"[\/]?([0-9]+)(?=[^\/]*$)", str(path))[0]),
            default=None,
        )
