"""What the folders of ``accelerator.save_state`` and of the Transformers Trainer have of second order."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.side_file import FILE as SIDE_FILE
from lightning_soo.checkpoint.side_file import read_side_file, write_side_file
from lightning_soo.checkpoint.sources import read_file
from lightning_soo.checkpoint_folders import check_checkpoint, load_checkpoint, save_checkpoint
from lightning_soo.integrations import deepspeed_state, second_order_folder
from lightning_soo.integrations.session import innermost
from lightning_soo.optim.base import SecondOrderOptimizer


@dataclass(frozen=True)
class Part:
    """A prepared model and its optimizers, which are saved in one folder."""

    model: nn.Module
    optimizers: list[SecondOrderOptimizer]

    @property
    def engine(self) -> Any:
        """DeepSpeed's, if it is one."""
        return self.model if hasattr(self.model, "zero_optimization") else None


def parts_of(models: Sequence[nn.Module], optimizers: Sequence[SecondOrderOptimizer]) -> list[Part] | None:
    """Every model with its optimizers; None where the parameters of one are not in one model. Local."""
    parts = [Part(model, []) for model in dict.fromkeys(models)]
    for optimizer in optimizers:
        wanted = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        holders = [
            part
            for part in parts
            if (
                innermost(getattr(part.engine, "optimizer", None)) is optimizer
                if part.engine is not None
                else wanted <= {id(parameter) for parameter in part.model.parameters()}
            )
        ]
        if not holders:
            return None
        holders[0].optimizers.append(optimizer)
    return parts


def save_parts(
    parts: Sequence[Part], folder: str | Path, extra: Mapping[str, Any] | None = None, *, frozen: bool = True
) -> None:
    """Write ``second_order``, of further models ``second_order_1`` and so on. Collective.

    Args:
        extra: plain data that :func:`load_parts` returns.
        frozen: whether weights that are not trained are written too.

    Raises:
        CheckpointError: parameters that no rank has given, or twice.
    """
    for path, part in _named(parts, folder):
        told, files = dict(extra or {}), None
        if part.engine is not None:
            told["deepspeed"] = deepspeed_state.engine_counters(part.engine)
            files = partial(_write, deepspeed_state.engine_state(part.engine, {}))
        save_checkpoint(path, part.model, part.optimizers, extra=told, files=files, frozen=frozen)


def check_parts(parts: Sequence[Part], folder: str | Path, *, strict: bool = True) -> None:
    """Compare with checksums, and with models and optimizers; nothing is changed. Collective.

    Raises:
        CheckpointError: what :func:`load_parts` would refuse; on every rank.
    """
    for path, part in _named(parts, folder):
        check_checkpoint(path, part.model, part.optimizers, strict=strict)


def load_parts(parts: Sequence[Part], folder: str | Path, *, strict: bool = True) -> dict[str, Any]:
    """Read what :func:`save_parts` wrote, by any number of ranks and any engine. Collective.

    Returns:
        ``extra``.

    Raises:
        CheckpointError: damaged, incomplete, or of another model or method; on every rank.
    """
    found: dict[str, Any] = {}
    for path, part in reversed(_named(parts, folder)):
        state = second_order_folder.from_first_rank(partial(deepspeed_state.read_state, store.find(path)))
        _, found = load_checkpoint(path, part.model, part.optimizers, strict=strict)
        if part.engine is not None:
            steps = sum(optimizer.steps for optimizer in part.optimizers)
            deepspeed_state.restore_state(part.engine, state)
            deepspeed_state.restore_counters(part.engine, found.get("deepspeed"), steps)
    return found


def has_parts(folder: str | Path) -> bool:
    """Whether :func:`save_parts` wrote there, the same answer on every rank. Collective.

    Raises:
        CheckpointError: saving was interrupted, or only some ranks see it.
    """
    return second_order_folder.is_there(Path(folder) / second_order_folder.NAME)


@contextmanager
def without(accelerator: Any, *names: str) -> Iterator[None]:
    """Within it these lists of the accelerator are empty: they are not Accelerate's to save or to load."""
    before = {name: getattr(accelerator, name) for name in names}
    for name in names:
        setattr(accelerator, name, [])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(accelerator, name, value)


def save_preconditioners(
    accelerator: Any, optimizers: Sequence[SecondOrderOptimizer], folder: str, *, on_each_node: bool | None = None
) -> None:
    """Where models and optimizers are not one to one, before Accelerate writes the rest: gather preconditioners.

    Collective. In one process and under DDP they are part of the optimizer's own state, which is written next: by the
    main process, or with ``on_each_node`` by one of each machine (None is what the accelerator is configured to do).
    Engines that shard get a file beside the others.
    """
    if accelerator.is_main_process:  # of an earlier save, which would be taken for this one
        shutil.rmtree(Path(folder) / second_order_folder.NAME, ignore_errors=True)
    if any(optimizer.is_sharded for optimizer in optimizers):
        write_side_file(optimizers, folder, accelerator.is_main_process)
        return
    everywhere = accelerator.project_configuration.save_on_each_node if on_each_node is None else on_each_node
    for optimizer in optimizers:
        optimizer.consolidate(to=None if everywhere else 0)


def load_preconditioners(accelerator: Any, optimizers: Sequence[SecondOrderOptimizer], folder: str) -> None:
    """After an engine that shards has loaded its part: hand the file's content to every rank. Collective."""
    if any(optimizer.is_sharded for optimizer in optimizers):
        read_side_file(optimizers, folder, accelerator.is_main_process)


def refuse_first_order(accelerator: Any, folder: str | Path, optimizers: Sequence[SecondOrderOptimizer]) -> None:
    """Before anything is loaded of a checkpoint that has no folder of ours.

    Raises:
        CheckpointError: it is of a first-order run, which nobody has asked to adopt, or its optimizers do not fit;
            under FSDP also where it is to be adopted. On every rank.
    """
    if str(accelerator.distributed_type.value) != "FSDP":
        for index, optimizer in enumerate(optimizers):
            file = Path(folder) / (f"optimizer_{index}.bin" if index else "optimizer.bin")
            if file.is_file() and not optimizer.is_sharded:
                optimizer.check_state_dict(read_file(file))
        return
    if not second_order_folder.from_first_rank((Path(folder) / SIDE_FILE).is_file):
        raise CheckpointError(
            f"{folder} is of a first-order run: adopt: true takes its moments in one process, under DDP and ZeRO, but "
            "not under FSDP, which cannot load what another optimizer has saved"
        )


def _named(parts: Sequence[Part], folder: str | Path) -> list[tuple[Path, Part]]:
    name = second_order_folder.NAME
    return [(Path(folder) / (f"{name}_{index}" if index else name), part) for index, part in enumerate(parts)]


def _write(state: Mapping[str, Any], unfinished: Path) -> None:
    torch.save(state, unfinished / deepspeed_state.FILE)
