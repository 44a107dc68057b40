"""Checkpoints of the Transformers Trainer, from any engine and number of processes to any other."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import Trainer

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.sources import read_file
from lightning_soo.integrations.accelerate_state import (
    Part,
    has_parts,
    load_parts,
    load_preconditioners,
    parts_of,
    refuse_first_order,
    save_parts,
    save_preconditioners,
)
from lightning_soo.integrations.second_order_folder import NAME, from_first_rank
from lightning_soo.integrations.session import innermost
from lightning_soo.optim.base import SecondOrderOptimizer

_SCHEDULER = "scheduler.pt"  # as the Trainer calls it


def install_checkpoints(asks: Callable[[Any], bool], adopts: Callable[[Any], bool]) -> None:
    """Let Trainers that train to second order save and load a folder of ours, ``second_order``; others are left alone.

    Weights and moments of a checkpoint that has it come from there, at once, and are checked before anything changes.

    Args:
        asks: whether a Trainer, whose optimizer may not be there yet, will train to second order.
        adopts: whether it takes the checkpoint of a first-order run.
    """
    save, load_weights, load = (
        Trainer._save_optimizer_and_scheduler,
        Trainer._load_from_checkpoint,
        Trainer._load_optimizer_and_scheduler,
    )
    load_engine = transformers.trainer.deepspeed_load_checkpoint

    @functools.wraps(save)
    def save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        optimizers, parts = _optimizers(self), _parts(self)
        if parts is not None:
            is_peft = transformers.trainer._is_peft_model(self.model)  # whose checkpoints have no frozen weights
            save_parts(parts, output_dir, frozen=not is_peft)
            if not self.is_deepspeed_enabled and not self.is_fsdp_enabled:
                if self.args.should_save:
                    torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, _SCHEDULER))
                return
        elif optimizers:
            on_each_node = bool(self.args.save_on_each_node)
            save_preconditioners(self.accelerator, optimizers, output_dir, on_each_node=on_each_node)
        with _moments_once(parts is not None):
            save(self, output_dir)

    @functools.wraps(load_weights)
    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        if asks(self) and has_parts(resume_from_checkpoint):
            self._second_order_waits = resume_from_checkpoint  # for the optimizer, to load all or nothing
            return
        if asks(self):
            _refuse_first_order(Path(resume_from_checkpoint), adopt=adopts(self))
        load_weights(self, resume_from_checkpoint, model)

    @functools.wraps(load_engine)
    def load_engine_checkpoint(deepspeed_engine: Any, checkpoint_path: str, *arguments: Any, **options: Any) -> None:
        inner = innermost(getattr(deepspeed_engine, "optimizer", None))
        is_fresh = deepspeed_engine.global_steps == 0  # it resumes: later the best model is loaded, and that alone
        if not (is_fresh and isinstance(inner, SecondOrderOptimizer) and has_parts(checkpoint_path)):
            load_engine(deepspeed_engine, checkpoint_path, *arguments, **options)

    @functools.wraps(load)
    def load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        waits = vars(self).pop("_second_order_waits", None)
        optimizers, parts = _optimizers(self), _parts(self)
        if checkpoint is not None and parts is not None and has_parts(checkpoint):
            is_own = type(self.lr_scheduler).__name__ != "DeepSpeedSchedulerWrapper"  # or it is loaded with the engine
            scheduler = from_first_rank(functools.partial(_read_scheduler, Path(checkpoint))) if is_own else None
            load_parts(parts, checkpoint)
            if is_own:
                self.lr_scheduler.load_state_dict(scheduler)
            return
        if waits is not None:
            raise CheckpointError(
                f"{waits} has its weights and moments in {NAME}, but the optimizer of this Trainer is no second-order "
                "one of its model"
            )
        is_ours = bool(optimizers) and checkpoint is not None
        if is_ours and any(Path(str(checkpoint)).glob("optimizer*")):  # with weights alone optimizers start anew
            refuse_first_order(self.accelerator, str(checkpoint), optimizers)
        load(self, checkpoint)
        if is_ours:
            load_preconditioners(self.accelerator, optimizers, str(checkpoint))

    Trainer._save_optimizer_and_scheduler = save_optimizer_and_scheduler
    Trainer._load_from_checkpoint = load_from_checkpoint
    Trainer._load_optimizer_and_scheduler = load_optimizer_and_scheduler
    transformers.trainer.deepspeed_load_checkpoint = load_engine_checkpoint


def _refuse_first_order(checkpoint: Path, *, adopt: bool) -> None:
    """Before weights are loaded, when there is no optimizer yet that could look at its own state.

    Raises:
        CheckpointError: damaged, or of a first-order run that is not to be adopted.
    """
    file = checkpoint / "optimizer.pt"
    if file.is_file() and "second_order" not in read_file(file) and not adopt:
        raise CheckpointError(
            f"{checkpoint} is of a first-order run: adopt: true in the configuration takes its moments, and "
            "preconditioners start anew"
        )


def _optimizers(trainer: Any) -> list[SecondOrderOptimizer]:
    session = vars(trainer.accelerator).get("_second_order")
    return list(session.optimizers) if session is not None else []


def _parts(trainer: Any) -> list[Part] | None:
    optimizers = _optimizers(trainer)
    return parts_of([trainer.model_wrapped], optimizers) if optimizers else None


def _read_scheduler(checkpoint: Path) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: there is none, which a DeepSpeed configuration with a scheduler of its own leaves.
    """
    file = checkpoint / _SCHEDULER
    if not file.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {_SCHEDULER}: was it saved with the scheduler of a DeepSpeed configuration? Resume "
            "with the same one"
        )
    return read_file(file)


@contextmanager
def _moments_once(wanted: bool) -> Iterator[None]:
    """Within it the Trainer writes weights under FSDP, but not the moments, which our folder has."""
    write = transformers.trainer.save_fsdp_optimizer
    if wanted:
        transformers.trainer.save_fsdp_optimizer = lambda *_, **__: None
    try:
        yield
    finally:
        transformers.trainer.save_fsdp_optimizer = write
