"""FSDP1 (``FullyShardedDataParallel``): flat parameters, cut anywhere, with ``use_orig_params`` True or False."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lightning_soo.placement.adapters.dense import whole
from lightning_soo.placement.adapters.names import class_names, group_parameters, module_classes
from lightning_soo.placement.fragments import Fragment, canonical_name
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.overrides import ParameterSpec


def _handles(model: nn.Module | None) -> Iterator[tuple[str, Any]]:
    """Every FSDP1 module of a model with a flat parameter: its name and its handle."""
    if model is None or not dist.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            yield name, module._handle


def matches(groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int]) -> bool:
    return next(_handles(model), None) is not None


def read_layout(groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int]) -> Layout:
    """Slices of every flattened parameter; parameters of ``ignored_states`` are whole on every rank.

    Raises:
        TypeError: several shard groups, or an optimizer that was built before wrapping.
    """
    pieces: dict[int, list[tuple[Fragment, ParameterSpec]]] = {}
    copies: dict[tuple[int, ...], Any] = {}
    for prefix, handle in _handles(model):
        flat = handle.flat_param
        if handle.uses_sharded_strategy and handle.world_size > 1:
            copies[tuple(dist.get_process_group_ranks(handle.process_group))] = handle.process_group
        infos = zip(flat._fqns, flat._shapes, flat._shard_param_infos, flat._param_infos, strict=True)
        for index, (fqn, shape, info, (_, module, _)) in enumerate(infos):
            # with original parameters the optimizer holds a view of each; without, the flat shard as a whole
            tensor = flat._params[index] if flat._params is not None else flat
            start = info.intra_param_start_idx if info.in_shard else 0
            count = info.numel_in_shard if info.in_shard else 0
            name = canonical_name(f"{prefix}.{fqn}" if prefix else fqn)
            fragment = Fragment(
                name=name,
                shape=tuple(shape),
                start=start,
                stop=start + count,
                tensor=tensor,
                offset=0 if tensor is not flat or not info.in_shard else info.offset_in_shard,
            )
            spec = ParameterSpec(
                name=name,
                shape=tuple(shape),
                dtype=flat.dtype,
                requires_grad=tensor.requires_grad,
                module_classes=class_names(module),
            )
            pieces.setdefault(id(tensor), []).append((fragment, spec))
    if len(copies) > 1:
        raise TypeError(
            f"FSDP modules are sharded over different ranks ({', '.join(str(list(c)) for c in list(copies)[:2])}): one "
            "shard group for the whole model is supported"
        )
    ranks, group = next(iter(copies.items())) if copies else ((), None)
    classes = module_classes(model)
    found: list[tuple[Fragment, ParameterSpec]] = []
    numbers: list[int] = []
    for parameter, number, name in group_parameters(groups, model):
        own = pieces.get(id(parameter)) or [whole(parameter, name, classes)]
        found += own
        numbers += [number] * len(own)
    if not pieces.keys() & {id(parameter) for group_ in groups for parameter in group_["params"]}:
        raise TypeError(
            "the optimizer holds none of the parameters of this FSDP model: with use_orig_params=False it must be "
            "built after wrapping"
        )
    return Layout(
        engine="fsdp",
        fragments=tuple(fragment for fragment, _ in found),
        specs=tuple(spec for _, spec in found),
        groups=tuple(numbers),
        shard_group=group,
        shard_ranks=ranks,
        forget_gathered=_reshard,
        gathered=_gathered,
    )


@contextmanager
def _gathered(model: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """All parameters whole and in full precision, and the wrappers passed over.

    FSDP's forward would free them before a second backward pass, and it refuses to run inside this context.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            wrappers = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
            for wrapper in wrappers:
                wrapper.forward = wrapper.module.__call__  # type: ignore[method-assign]
            try:
                yield {canonical_name(name): parameter for name, parameter in model.named_parameters()}
            finally:
                for wrapper in wrappers:
                    del wrapper.forward
    finally:
        _reshard(model)  # also what an evaluation before it had left gathered, which has trial values now


def _reshard(model: nn.Module) -> None:
    """The root's parameters above all, which stay gathered after a forward pass."""
    for _, handle in _handles(model):
        if handle.uses_sharded_strategy:
            handle.reshard(True)
            handle.post_reshard()
