"""A DeepSpeed checkpoint at another number of ranks than it was saved with: all of it that no rank owns.

ZeRO's own files hold flat partitions of one number of ranks, which DeepSpeed refuses at any other.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # stages 1 and 2, stage 3
_FRAGMENTS, _SHAPES = "frozen_param_fragments", "frozen_param_shapes"


def saved_world_size(folder: str | Path, tag: str) -> int | None:
    """Over how many ranks ZeRO's state in a checkpoint is divided; None where none is: stage 0, or no checkpoint.

    As the checkpoint says of itself, because files of more ranks may be left from an earlier one with the same tag;
    where it does not, their number. Nothing in the files is executed. Local.
    """
    path = Path(folder) / str(tag)
    ranks = {int(match[1]) for match in map(_OPTIMIZER_FILE.fullmatch, _names(path)) if match}
    if not ranks:
        return None
    recorded = (_recorded_world_size(path / name) for name in _MODEL_FILES)
    return next((size for size in recorded if size is not None), len(ranks))


def load_engine_without_optimizer(
    engine: Any, folder: str | Path, tag: str, **options: Any
) -> tuple[str | None, dict[str, Any]]:
    """As ``engine.load_checkpoint``, from any number of ranks and without what ZeRO has divided over them.

    Loaded are the module's weights and buffers, at stage 3 its buffers and frozen parameters alone; the client's state;
    ``global_steps``, ``global_samples`` and ``skipped_steps``; the scheduler; the options of the optimizer's parameter
    groups; the loss scaler, and at stages 1 and 2 the clipping norm. At stage 3 ranks that did not exist get rank 0's
    buffers and client state. Masters become what the module's weights are: overwrite the fragments' tensors and their
    moments, then call ``Layout.write_back``. Collective, and every rank reads files of other ranks.

    Args:
        options: of ``engine.load_checkpoint``: ``load_module_strict``, ``load_lr_scheduler_states`` or
            ``custom_load_fn``.

    Returns:
        What ``engine.load_checkpoint`` does: path and client state.

    Raises:
        FileNotFoundError: no such checkpoint of ZeRO, one of another stage, or one that is not complete on this rank.
        ValueError: another number of parameter groups.
    """
    path = Path(folder) / str(tag)
    shared = _read_shared(path, engine)
    is_divided = engine.zero_optimization_partition_weights()
    if not (path / _MODEL_FILES[is_divided]).is_file():
        raise FileNotFoundError(
            f"{path} has no {_MODEL_FILES[is_divided]}, which a checkpoint of ZeRO stage "
            f"{'3' if is_divided else '1 or 2'} has: load it at the stage that it was saved at"
        )
    with ExitStack() as stack:
        # not loaded, says DeepSpeed then to itself, and makes masters from the module's weights
        stack.enter_context(_in_place_of(engine, "_load_zero_checkpoint", lambda *_, **__: False))
        if is_divided:
            stack.enter_context(_in_place_of(engine, "_get_all_ckpt_names", _names_of_any_rank(engine)))
            stack.enter_context(_in_place_of(engine, "load_module_state_dict", _with_frozen(engine, path)))
        # of the class: the engine's own may have been wrapped, to load moments after it
        loaded, client_state = type(engine).load_checkpoint(engine, str(folder), str(tag), **options)
    _restore_shared(engine.optimizer, shared)
    return loaded, client_state


def _names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir()) if path.is_dir() else []


def _recorded_world_size(file: Path) -> int | None:
    """``dp_world_size`` of a file with the model's states, read from its pickle's opcodes."""
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
        pickled = archive.read(name) if name is not None else b"."
    is_next = False
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            continue  # between a key and its value
        if is_next:
            return int(argument) if isinstance(argument, int) and "INT" in opcode.name else None
        is_next = argument == "dp_world_size"
    return None


def _read_shared(path: Path, engine: Any) -> Mapping[str, Any]:
    """Rank 0's part of ZeRO's state, in which some is the same on every rank; its tensors stay in the file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: another number of parameter groups.
    """
    names = ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    if engine.bfloat16_enabled():
        names.reverse()
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path} has no {names[0]}: is it a checkpoint of ZeRO, and on this rank's disk?")
    # DeepSpeed's own objects, read as DeepSpeed reads all files of this folder
    saved = torch.load(file, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(file))
    shared: Mapping[str, Any] = saved["optimizer_state_dict"]
    here, there = len(engine.optimizer.optimizer.param_groups), _saved_groups(shared)
    if there is not None and len(there) != here:
        raise ValueError(f"{path} was saved with {len(there)} parameter groups, the optimizer has {here}")
    return shared


def _saved_groups(shared: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """None in DeepSpeed's elastic checkpoints, which have none."""
    inner = shared.get("base_optimizer_state", shared.get("optimizer_state_dict"))
    return inner["param_groups"] if isinstance(inner, Mapping) else None


def _restore_shared(zero: Any, shared: Mapping[str, Any]) -> None:
    """As DeepSpeed does it of a universal checkpoint."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        zero._load_global_state_stage3(shared)
    elif hasattr(zero, "single_partition_of_fp32_groups"):
        zero._load_global_state(shared)
    else:
        zero.clip_grad = shared.get("clip_grad", zero.clip_grad)
    for group, saved in zip(zero.optimizer.param_groups, _saved_groups(shared) or (), strict=False):
        options = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
        group.update(deepcopy(options))  # nothing that refers to the file, which may be deleted


def _names_of_any_rank(engine: Any) -> Callable[[str, str], list[str]]:
    """A rank's own file with the model's states, or rank 0's."""

    def names(folder: str, tag: str) -> list[str]:
        rank, size = dist.get_rank(engine.optimizer.dp_process_group), saved_world_size(folder, tag)
        files = [_model_file(engine, folder, tag, rank)] if size is None or rank < size else []
        files.append(_model_file(engine, folder, tag, 0))
        return [file for file in files if Path(file).is_file()][:1]

    return names


def _model_file(engine: Any, folder: str | Path, tag: str, rank: int) -> str:
    return str(engine._get_ckpt_name(str(folder), tag, pp_placeholder=str(rank)))


def _with_frozen(engine: Any, path: Path) -> Callable[..., None]:
    """``load_module_state_dict`` with partitions of frozen parameters as they are divided now."""
    load = engine.load_module_state_dict

    def load_module_state_dict(checkpoint: Mapping[str, Any], *arguments: Any, **options: Any) -> None:
        if checkpoint.get(_FRAGMENTS):
            checkpoint = {**checkpoint, _FRAGMENTS: _frozen_partitions(engine, path, checkpoint)}
        load(checkpoint, *arguments, **options)

    return load_module_state_dict


def _frozen_partitions(engine: Any, path: Path, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """This rank's partition of every frozen parameter, from the partitions that any number of ranks have saved.

    Raises:
        FileNotFoundError: of one of them there is no file.
    """
    parameters = {name: parameter for parameter, name in engine.param_names.items() if name in checkpoint[_FRAGMENTS]}
    partitions = {name: torch.zeros_like(parameter.ds_tensor.data) for name, parameter in parameters.items()}
    for rank in range(int(checkpoint["dp_world_size"])):
        file = _model_file(engine, path.parent, path.name, rank)
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} is missing, with a part of {len(partitions)} frozen parameters")
        fragments = engine.checkpoint_engine.load(file, map_location="cpu")[_FRAGMENTS]
        for name, parameter in parameters.items():
            here, saved, numel = partitions[name].view(-1), fragments[name].view(-1), checkpoint[_SHAPES][name].numel()
            first = dist.get_rank(parameter.ds_process_group) * here.numel()
            start = max(first, rank * saved.numel())
            stop = min(first + here.numel(), (rank + 1) * saved.numel(), numel)
            if start < stop:
                offset = start - rank * saved.numel()
                here[start - first : stop - first].copy_(saved[offset : offset + stop - start])
    return partitions


@contextmanager
def _in_place_of(engine: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within it the engine's method ``name`` is ``function``."""
    before = vars(engine).get(name)
    setattr(engine, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(engine, name)
        else:
            setattr(engine, name, before)
