"""What is wrong with a configuration of ``accelerate launch``, found before any device is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_soo.config import parse_yaml
from lightning_soo.integrations.deepspeed_config import SECTION, find_second_order
from lightning_soo.integrations.packages import require_accelerate
from lightning_soo.naming import nearest

ENGINES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED")
_OLD_KEYS = ("fp16", "dynamo_backend")  # which Accelerate still takes
_ON_CPU = "set the environment variable ACCELERATE_TORCH_DEVICE=cpu and launch with -m lightning_soo.launch"


def launch_problems(path: str | os.PathLike[str]) -> list[str]:
    """Every problem in words, each with what to do about it; none where the file is sound.

    Raises:
        ImportError: Accelerate, which knows its keys, or PyYAML is missing.
    """
    require_accelerate(f"looking at {path}")
    file = Path(path)
    if not file.is_file():
        return [f"{file}: there is no such file"]
    try:
        text = file.read_text("utf-8")
        config = json.loads(text) if file.suffix == ".json" else parse_yaml(text, str(file))
    except ValueError as error:
        return [str(error) if str(file) in str(error) else f"{file}: {error}"]
    if not isinstance(config, Mapping):
        return [f"{file}: expected keys and values, such as 'distributed_type: FSDP'"]
    return [f"{file}: {problem}" for problem in _problems(config, file.parent)]


def _problems(config: Mapping[str, Any], folder: Path) -> Iterator[str]:
    from accelerate.commands.config.config_args import ClusterConfig

    known = [*ClusterConfig.__dataclass_fields__, *_OLD_KEYS]
    for key in config:
        if key not in known:
            yield f"unknown key {key!r}{nearest(str(key), known)}"
    engine = str(config.get("distributed_type"))
    if "distributed_type" not in config:
        yield f"distributed_type is missing: choose one of {', '.join(ENGINES)}"
    elif config["distributed_type"] is False:
        yield "distributed_type: NO is the word false to YAML: write 'NO' in quotes"
    elif engine not in ENGINES:
        yield f"distributed_type={engine!r} is not supported{nearest(engine, ENGINES)}"
    yield from _process_problems(config, engine)
    yield from _precision_problems(config, engine)
    if engine == "FSDP":
        yield from _fsdp_problems(config.get("fsdp_config") or {})
    elif config.get("fsdp_config"):
        yield f"fsdp_config has no effect with distributed_type={engine}: make it FSDP"
    if engine == "DEEPSPEED":
        yield from _deepspeed_problems(config, folder)
    elif config.get("deepspeed_config"):
        yield f"deepspeed_config has no effect with distributed_type={engine}: make it DEEPSPEED"


def _process_problems(config: Mapping[str, Any], engine: str) -> Iterator[str]:
    processes, machines = config.get("num_processes", 1), config.get("num_machines", 1)
    for name, value in (("num_processes", processes), ("num_machines", machines)):
        if type(value) is not int or value == 0 or value < -1:
            yield f"{name}={value!r}: must be a whole number of at least 1"
            return
    several = processes > 1
    if engine == "MULTI_CPU" and several and not config.get("mpirun_config"):
        yield (
            f"distributed_type=MULTI_CPU starts one process, not {processes}, without a word (only under MPI it starts "
            f"more): write distributed_type: MULTI_GPU without use_cpu, and {_ON_CPU}"
        )
    if engine in ("MULTI_GPU", "FSDP", "DEEPSPEED") and config.get("use_cpu"):
        what = f"{processes} processes that know nothing of each other" if engine == "MULTI_GPU" else "no sharding"
        yield f"use_cpu with distributed_type={engine} gives {what}: remove use_cpu, and {_ON_CPU}"
    if engine == "NO" and several:
        yield f"distributed_type=NO starts one process, not {processes}: write MULTI_GPU, FSDP or DEEPSPEED"
    if machines > 1 and (not config.get("main_process_ip") or not config.get("main_process_port")):
        yield f"num_machines={machines} needs main_process_ip and main_process_port of the first machine"
    if several and machines > 1 and processes % machines:
        yield f"num_processes={processes} is the number on all {machines} machines together, and not a multiple of it"
    rank = config.get("machine_rank", 0)
    if type(rank) is int and not 0 <= rank < machines:
        yield f"machine_rank={rank}: must be from 0 to {machines - 1}"


def _precision_problems(config: Mapping[str, Any], engine: str) -> Iterator[str]:
    precisions = ("no", "fp16", "bf16", "fp8")
    precision = str(config.get("mixed_precision") or "no")
    if config.get("mixed_precision") is False:
        precision = "no"  # what YAML makes of an unquoted no
    if precision not in precisions:
        yield f"mixed_precision={precision!r}{nearest(precision, precisions)}"
    on_cpu = config.get("use_cpu") or engine == "MULTI_CPU" or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu"
    if precision in ("fp16", "fp8") and on_cpu:
        yield f"mixed_precision={precision} does not work on CPUs: write bf16 or no"


def _fsdp_problems(fsdp: Mapping[str, Any]) -> Iterator[str]:
    from accelerate.commands.launch import launch_command_parser

    known = sorted(name for name in vars(launch_command_parser().parse_args(["x"])) if name.startswith("fsdp_"))
    for key in fsdp:
        name = key if str(key).startswith("fsdp_") else f"fsdp_{key}"
        if name not in known:
            yield f"fsdp_config: unknown key {key!r}, which Accelerate drops without a word{nearest(name, known)}"
    version = fsdp.get("fsdp_version", 1)
    if version not in (1, 2):
        yield f"fsdp_config: fsdp_version={version!r}: must be 1 or 2"
    if version == 1 and fsdp.get("fsdp_use_orig_params") is False:
        yield (
            "fsdp_config: with fsdp_use_orig_params: false an optimizer that was built before prepare() trains "
            "nothing: write true, or fsdp_version: 2"
        )
    wrap = fsdp.get("fsdp_auto_wrap_policy")
    if wrap == "SIZE_BASED_WRAP" and not fsdp.get("fsdp_min_num_params"):
        yield "fsdp_config: SIZE_BASED_WRAP needs fsdp_min_num_params; without it only the whole model is one unit"


def _deepspeed_problems(config: Mapping[str, Any], folder: Path) -> Iterator[str]:
    section = dict(config.get("deepspeed_config") or {})
    path = section.get("deepspeed_config_file")
    if path is None:
        from accelerate.commands.launch import launch_command_parser

        known = [name for name in vars(launch_command_parser().parse_args(["x"])) if not name.startswith("fsdp_")]
        for key in section:
            if key not in known:
                yield f"deepspeed_config: unknown key {key!r}{nearest(str(key), known)}"
        if section.get("zero_stage", 2) not in (0, 1, 2, 3):
            yield f"deepspeed_config: zero_stage={section['zero_stage']!r}: must be 1, 2 or 3"
        yield from _clipping("deepspeed_config", section)
        if section.get("offload_optimizer_device") == "nvme":
            yield "deepspeed_config: NVMe offload of the optimizer is not supported: write cpu or none"
        return
    if config.get("mixed_precision"):
        yield "mixed_precision is refused by Accelerate next to deepspeed_config_file: say it there"
    others = [key for key in section if key not in ("deepspeed_config_file", "zero3_init_flag")]
    if others:
        yield f"deepspeed_config: {others[0]} is refused by Accelerate next to deepspeed_config_file: say it there"
    file = next((one for one in (Path(path), folder / path) if one.is_file()), None)
    if file is None:
        yield f"deepspeed_config_file={path}: there is no such file"
        return
    try:
        inner = json.loads(file.read_text("utf-8"))
    except json.JSONDecodeError as error:
        yield f"{path}: not JSON: {error}"
        return
    if SECTION in inner:
        try:
            find_second_order(inner, str(path), None)
        except ValueError as error:
            yield str(error)
    if "optimizer" in inner:
        yield f"{path}: has an 'optimizer', which cannot be taken over: remove it, the script builds AdamW"
    yield from _clipping(str(path), inner)


def _clipping(where: str, section: Mapping[str, Any]) -> Iterator[str]:
    if section.get("gradient_clipping", "auto") == "auto":
        yield (
            f"{where}: without gradient_clipping DeepSpeed clips gradients at 1.0, whatever the script says "
            "(accelerator.clip_grad_norm_ does nothing there): write gradient_clipping: 0.0 for none, or the norm"
        )
