"""DeepSpeed ZeRO-1, 2 and 3: flat float32 partitions, one ``step()`` per parameter group or sub-group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.placement.adapters.names import model_names, module_classes
from lightning_soo.placement.fragments import Fragment, canonical_name
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.overrides import ParameterSpec

_ENGINES = ("DeepSpeedEngine", "PipelineEngine")


def _engine_optimizer(model: nn.Module | None) -> Any:
    """DeepSpeed's optimizer around ours: of the engine, or as the parameters themselves remember it."""
    if model is not None and any(base.__name__ in _ENGINES for base in type(model).__mro__):
        return getattr(model, "optimizer", None)
    for parameter in model.parameters() if model is not None else ():
        for attribute in ("_zero_optimizer", "_z3_optimizer"):
            if hasattr(parameter, attribute):
                return getattr(parameter, attribute)
    return None


def matches(groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int]) -> bool:
    optimizer = _engine_optimizer(model)
    # stage 0 in float32 steps the user's optimizer itself, on whole parameters
    return optimizer is not None and getattr(optimizer, "optimizer", None) is not None


def read_layout(groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int]) -> Layout:
    """Slices of every parameter in this rank's flat partitions.

    Raises:
        TypeError: a DeepSpeed feature that moves optimizer state elsewhere, by name.
    """
    zero = _engine_optimizer(model)
    kind = type(zero).__name__
    _refuse(zero, model, kind)
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        flats, rows, numbers = list(zero.fp32_partitioned_groups_flat), _stage3(zero), zero.sub_group_to_group_id
    elif hasattr(zero, "single_partition_of_fp32_groups"):
        flats, rows, numbers = list(zero.single_partition_of_fp32_groups), _placed(zero), None
    elif hasattr(zero, "fp32_groups_flat_partition"):  # BF16_Optimizer: ZeRO-1, gradients accumulated in float32
        flats, rows, numbers = list(zero.fp32_groups_flat_partition), _linked(zero.bf16_groups), None
    else:
        raise TypeError(f"DeepSpeed's {kind} keeps its own flat copies: use ZeRO stage 1, 2 or 3")
    at_once = hasattr(zero, "fp32_groups_flat_partition")
    names = {**model_names(model), **{id(p): canonical_name(name) for p, name in zero.param_names.items()}}
    classes = module_classes(model if model is not None else getattr(zero, "module", None))
    fragments, specs, parts = [], [], []
    for part, parameter, shape, start, stop, offset in rows:
        name = names[id(parameter)]
        fragments.append(Fragment(name=name, shape=shape, start=start, stop=stop, tensor=flats[part], offset=offset))
        parts.append(part)
        specs.append(
            ParameterSpec(
                name=name,
                shape=shape,
                dtype=flats[part].dtype,
                part=0 if at_once else part,
                module_classes=classes.get(id(parameter), ()),
            )
        )
    group = zero.dp_process_group
    ranks = tuple(dist.get_process_group_ranks(group))
    return Layout(
        engine="zero-3" if hasattr(zero, "fp32_partitioned_groups_flat") else f"zero-{_stage(zero)}",
        fragments=tuple(fragments),
        specs=tuple(specs),
        groups=tuple(numbers[part] if numbers is not None else part for part in parts),
        shard_group=group,
        shard_ranks=ranks if len(ranks) > 1 else (),
        part_of={} if at_once else {id(flat): part for part, flat in enumerate(flats)},
        pending_gradients=None if at_once else _pending(zero, flats, fragments, parts),
        loss_divisor=_loss_divisor(zero, model),
        updates_model_later=True,
        write_back=_write_back(zero),
    )


Row = tuple[int, Tensor, tuple[int, ...], int, int, int]


def _placed(zero: Any) -> Iterator[Row]:
    """``(part, parameter, shape, start, stop, offset)`` from where parameters lie in their group's flat copy.

    DeepSpeed's own links ignore the order of ``round_robin_gradients``.
    """
    for part, parameters in enumerate(zero.bit16_groups):
        flat, group = zero.bit16_groups_flat[part], zero.real_dp_process_group[part]
        size = flat.numel() // dist.get_world_size(group)
        first = flat.storage_offset() + dist.get_rank(group) * size
        for parameter in parameters:
            begin = parameter.storage_offset()
            start, stop = max(first, begin) - begin, min(first + size, begin + parameter.numel()) - begin
            held = (start, stop, begin + start - first) if start < stop else (0, 0, 0)
            yield part, parameter, tuple(parameter.shape), *held


def _linked(groups: Sequence[Sequence[Any]]) -> Iterator[Row]:
    """As :func:`_placed`, from the links that DeepSpeed hangs on every parameter."""
    for part, parameters in enumerate(groups):
        for parameter in parameters:
            link = parameter._hp_mapping
            if link is None:
                yield part, parameter, tuple(parameter.shape), 0, 0, 0
                continue
            here, there = link.lp_fragment_address, link.hp_fragment_address
            yield part, parameter, tuple(parameter.shape), here.start, here.start + here.numel, there.start


def _stage3(zero: Any) -> Iterator[Row]:
    for part, parameters in enumerate(zero.fp16_groups):
        rank = dist.get_rank(zero._get_sub_group_process_group(part))
        for parameter in parameters:
            _, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = min(rank * numel, parameter.ds_numel)
            stop = min(start + numel, parameter.ds_numel)
            yield part, parameter, tuple(parameter.ds_shape), start, stop, offset


def _pending(
    zero: Any, flats: Sequence[Tensor], fragments: Sequence[Fragment], parts: Sequence[int]
) -> Callable[[], tuple[Mapping[int, Tensor], float]]:
    """Reads gradients of groups that DeepSpeed has not reached yet in its step; they are still scaled, unclipped."""
    by_part: dict[int, dict[int, int]] = {}
    for index, (fragment, part) in enumerate(zip(fragments, parts, strict=True)):
        if fragment.stop > fragment.start:
            by_part.setdefault(part, {})[fragment.offset] = index

    def read() -> tuple[Mapping[int, Tensor], float]:
        found: dict[int, Tensor] = {}
        for part, flat in enumerate(flats):
            if part == 0:
                continue  # the group being stepped: its gradient is in place, unscaled
            averaged = zero.averaged_gradients.get(part)
            if averaged is None:
                if flat.grad is not None:  # offloaded
                    for index in by_part.get(part, {}).values():
                        found[index] = fragments[index].local(flat.grad)
                continue
            position = 0
            for piece in averaged:
                index = by_part.get(part, {}).get(position, -1)
                if index >= 0:
                    found[index] = piece.reshape(-1)[: fragments[index].stop - fragments[index].start]
                position += piece.numel()
        return found, float(zero.loss_scale)

    return read


def _loss_divisor(zero: Any, model: nn.Module | None) -> Callable[[], float]:
    """DeepSpeed divides a loss by the number of micro-batches, and scales it in float16."""

    def read() -> float:
        steps = getattr(model, "gradient_accumulation_steps", None)  # of the engine
        count = steps() if callable(steps) else getattr(zero, "gradient_accumulation_steps", 1)
        return float(count) / float(getattr(zero, "loss_scale", 1.0))

    return read


def _write_back(zero: Any) -> Callable[[], None]:
    """As at the end of DeepSpeed's own step."""

    def reassign() -> None:
        zero.checkpoint_event_prologue()  # small parameters are kept whole between steps: let them go
        for part in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(part)
        zero.checkpoint_event_epilogue()  # and gather them from the new partitions

    def update() -> None:
        zero.update_lp_params()

    return reassign if hasattr(zero, "fp32_partitioned_groups_flat") else update


def _stage(zero: Any) -> int:
    return 2 if getattr(zero, "partition_gradients", False) else 1


def _refuse(zero: Any, model: nn.Module | None, kind: str) -> None:
    reasons = {
        "NVMe offload of the optimizer": getattr(zero, "swap_optimizer", False),
        "zero_hpz_partition_size (ZeRO++)": getattr(zero, "zero_hpz_partition_size", 1) > 1,
        "MiCS": "MiCS" in kind,
        "mixture of experts": getattr(zero, "has_moe_layers", False),
        "pipeline parallelism": any(base.__name__ == "PipelineEngine" for base in type(model).__mro__),
        "twin-flow offload (offload_optimizer ratio below 1)": getattr(zero, "partial_offload", 1.0) < 1.0
        and getattr(zero, "offload_optimizer", False),
    }
    for name, found in reasons.items():
        if found:
            raise TypeError(f"{name} is not supported with DeepSpeed's {kind}: switch it off, or use plain ZeRO 1-3")
