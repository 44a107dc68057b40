"""DTensor parameters: FSDP2 (``fully_shard``), and HSDP by a two-dimensional mesh."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.placement.adapters.dense import refuse_complex, whole
from lightning_soo.placement.adapters.names import group_parameters, module_classes
from lightning_soo.placement.fragments import Fragment, canonical_name
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.overrides import ParameterSpec


def matches(groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int]) -> bool:
    return any(hasattr(parameter, "placements") for group in groups for parameter in group["params"])


def read_layout(groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int]) -> Layout:
    """Rows of every sharded parameter; parameters that are no DTensors are whole on every rank.

    Raises:
        TypeError: sharded in another way than by rows over one mesh dimension (tensor parallelism, a shard_placement_fn
            that chooses another dimension, several shard groups).
    """
    classes = module_classes(model)
    fragments, specs, numbers = [], [], []
    copies: dict[tuple[int, ...], tuple[Any, str]] = {}
    for parameter, number, name in group_parameters(groups, model):
        if not hasattr(parameter, "placements"):
            fragment, spec = whole(parameter, name, classes)
        else:
            refuse_complex(parameter, name)
            fragment = _rows(parameter, name)
            dim = _shard_dim(parameter, name)
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            if dim is not None and mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                copies[tuple(dist.get_process_group_ranks(group))] = group, name
            spec = ParameterSpec(
                name=name,
                shape=tuple(parameter.shape),
                dtype=parameter.dtype,
                requires_grad=parameter.requires_grad,
                module_classes=classes.get(id(parameter), ()),
            )
        fragments.append(fragment)
        specs.append(spec)
        numbers.append(number)
    if len(copies) > 1:
        (first, (_, one)), (second, (_, other)) = list(copies.items())[:2]
        raise TypeError(
            f"parameter {one!r} is sharded over ranks {list(first)}, {other!r} over {list(second)}: one shard group "
            "for the whole model is supported"
        )
    ranks, (group, _) = next(iter(copies.items())) if copies else ((), (None, ""))
    return Layout(
        engine="hsdp" if copies and len(ranks) < dist.get_world_size() else "fsdp2",
        fragments=tuple(fragments),
        specs=tuple(specs),
        groups=tuple(numbers),
        shard_group=group,
        shard_ranks=ranks,
        forget_gathered=_reshard,
        gathered=_gathered,
    )


@contextmanager
def _gathered(model: nn.Module | None) -> Iterator[Mapping[str, Tensor]]:
    """Every module keeps its parameters gathered through forward and backward passes; sharded again at the end."""
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)] if model is not None else []
    if model is None or not modules:
        raise TypeError(
            "parameters sharded by FSDP2 are gathered by their modules: build the optimizer with the model, or call "
            "optimizer.attach(model)"
        )
    before = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in _groups(modules)]
    automatic = [(state, state._auto_reshard_after_forward) for state in map(_state, modules)]
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()
        yield {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    finally:
        for group, mesh, after_backward in before:
            group.post_forward_mesh_info, group.reshard_after_backward = mesh, after_backward
        for state, value in automatic:
            state._auto_reshard_after_forward = value
        _reshard(model)


def _state(module: Any) -> Any:
    return module._get_fsdp_state()


def _groups(modules: Sequence[Any]) -> list[Any]:
    """What holds the parameters of each module; one for each of them before torch 2.10."""
    found: list[Any] = []
    for state in map(_state, modules):
        groups = getattr(state, "_fsdp_param_groups", None)
        found += groups if groups is not None else [state._fsdp_param_group] if state._fsdp_param_group else []
    return found


def _reshard(model: nn.Module) -> None:
    """The root's parameters above all, which stay gathered after a forward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _shard_dim(parameter: Tensor, name: str) -> int | None:
    """The mesh dimension over which rows are divided; None where every rank holds everything."""
    placements = parameter.placements  # type: ignore[attr-defined]
    found = [index for index, placement in enumerate(placements) if not placement.is_replicate()]
    if not found:
        return None
    placement = placements[found[0]]
    if len(found) > 1 or type(placement).__name__ != "Shard" or placement.dim != 0:
        raise TypeError(
            f"parameter {name!r} is placed {tuple(placements)}: rows over one mesh dimension (FSDP2, HSDP) are "
            "supported; tensor parallelism, sharding of another dimension and partial sums are not"
        )
    return found[0]


def _rows(parameter: Tensor, name: str) -> Fragment:
    shape = tuple(parameter.shape)
    start, dim = 0, _shard_dim(parameter, name)
    local = parameter.to_local()  # type: ignore[attr-defined]
    if dim is not None and local.numel():
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        # as torch.chunk: every rank but the last ones holds ceil(rows / ranks)
        rows = -(-shape[0] // mesh.size(dim))
        start = mesh.get_local_rank(dim) * rows * math.prod(shape[1:])
    return Fragment(name=name, shape=shape, start=start, stop=start + local.numel(), tensor=parameter)
