"""Whole parameters: one device, and DistributedDataParallel (every rank holds all of every parameter)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_soo.placement.fragments import Fragment, canonical_name
from lightning_soo.placement.overrides import ParameterSpec


def module_classes(model: nn.Module | None) -> dict[int, tuple[str, ...]]:
    """``id(parameter)`` -> class names of every module that holds it.

    By identity, not by name: a tied embedding is found under whichever name it was registered first.
    """
    found: dict[int, tuple[str, ...]] = {}
    for module in model.modules() if model is not None else ():
        for parameter in module.parameters(recurse=False):
            names = tuple(base.__name__ for base in type(module).__mro__[:-1] if base is not nn.Module)
            found[id(parameter)] = found.get(id(parameter), ()) + names
    return found


def model_names(model: nn.Module | None) -> dict[int, str]:
    """``id(parameter)`` -> canonical name; a tied parameter keeps its first name."""
    if model is None:
        return {}
    return {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}


def list_fragments(names: Mapping[int, str], parameters: Iterable[torch.Tensor]) -> list[Fragment]:
    """One whole fragment per parameter.

    Raises:
        TypeError: a parameter that another engine has sharded (a flat ZeRO partition has no shape of its own).
    """
    fragments = []
    for parameter in parameters:
        name = names[id(parameter)]
        if type(parameter).__name__ == "DTensor" or hasattr(parameter, "placements"):
            raise TypeError(f"parameter {name!r} is a DTensor: only whole parameters (one device, DDP) are supported")
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            raise TypeError(f"parameter {name!r} is partitioned by DeepSpeed ZeRO: this engine is not supported")
        if type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False):
            raise TypeError(f"parameter {name!r} is sharded by FSDP1: this engine is not supported")
        if parameter.is_complex():
            raise TypeError(f"parameter {name!r} is complex ({parameter.dtype}): only real parameters are supported")
        fragments.append(
            Fragment(
                name=name, shape=tuple(parameter.shape), start=0, stop=parameter.numel(), tensor=parameter, offset=0
            )
        )
    return fragments


def parameter_specs(
    fragments: Iterable[Fragment], classes: Mapping[int, tuple[str, ...]] | None = None
) -> list[ParameterSpec]:
    """What placement needs of each fragment's parameter."""
    classes = classes or {}
    return [
        ParameterSpec(
            name=fragment.name,
            shape=fragment.shape,
            element_size=fragment.tensor.element_size(),
            requires_grad=fragment.tensor.requires_grad,
            module_classes=classes.get(id(fragment.tensor), ()),
        )
        for fragment in fragments
    ]
