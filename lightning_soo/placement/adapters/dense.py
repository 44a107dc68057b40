"""Whole parameters: one device, and DistributedDataParallel (every rank holds all of every parameter)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_soo.placement.adapters.names import group_parameters, module_classes
from lightning_soo.placement.fragments import Fragment
from lightning_soo.placement.layout import Layout
from lightning_soo.placement.overrides import ParameterSpec


def matches(groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int]) -> bool:
    return True


def read_layout(groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int]) -> Layout:
    """One whole fragment per parameter.

    Raises:
        TypeError: a parameter that an engine has sharded without saying how.
    """
    classes = module_classes(model)
    fragments, specs, numbers = [], [], []
    for parameter, number, name in group_parameters(groups, model):
        _refuse_foreign(parameter, name, constructed)
        fragment, spec = whole(parameter, name, classes)
        fragments.append(fragment)
        specs.append(spec)
        numbers.append(number)
    held = {fragment.name: fragment.tensor for fragment in fragments}
    return Layout(
        engine="dense",
        fragments=tuple(fragments),
        specs=tuple(specs),
        groups=tuple(numbers),
        gathered=lambda model: _quiet(model, held),
        shared_buffers=_shared_buffers,
    )


@contextmanager
def _quiet(model: nn.Module | None, held: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Parameters are whole already; DDP reduces no gradients and sends no buffers, however many passes a rank runs."""
    if not isinstance(model, DistributedDataParallel):
        yield held
        return
    sends = model.broadcast_buffers
    model.broadcast_buffers = False
    try:
        with model.no_sync():
            yield held
    finally:
        model.broadcast_buffers = sends


def _shared_buffers(model: nn.Module | None) -> list[Tensor]:
    sends = isinstance(model, DistributedDataParallel) and model.broadcast_buffers
    return list(model.buffers()) if model is not None and sends else []


def whole(parameter: Tensor, name: str, classes: dict[int, tuple[str, ...]]) -> tuple[Fragment, ParameterSpec]:
    """A parameter that this rank holds completely."""
    refuse_complex(parameter, name)
    shape = tuple(parameter.shape)
    return (
        Fragment(name=name, shape=shape, start=0, stop=parameter.numel(), tensor=parameter),
        ParameterSpec(
            name=name,
            shape=shape,
            dtype=parameter.dtype,
            requires_grad=parameter.requires_grad,
            module_classes=classes.get(id(parameter), ()),
        ),
    )


def refuse_complex(parameter: Tensor, name: str) -> None:
    """
    Raises:
        TypeError: the parameter is complex.
    """
    if parameter.is_complex():
        raise TypeError(f"parameter {name!r} is complex ({parameter.dtype}): only real parameters are supported")


def _refuse_foreign(parameter: Tensor, name: str, constructed: Collection[int]) -> None:
    attach = "call optimizer.attach(model) with the wrapped model, or build the optimizer with it"
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        raise TypeError(
            f"parameter {name!r} belongs to DeepSpeed: call optimizer.attach(engine) with what "
            "deepspeed.initialize returned"
        )
    if type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_fsdp_flattened", False):
        raise TypeError(f"parameter {name!r} is sharded by FSDP: {attach}")
    replaced = bool(constructed) and id(parameter) not in constructed
    if replaced and parameter.ndim == 1 and not isinstance(parameter, nn.Parameter):
        raise TypeError(
            f"{name!r} is a flat tensor of {parameter.numel()} elements that an engine has put in the place of this "
            f"optimizer's parameters: which parameters it holds is unknown; {attach}"
        )
