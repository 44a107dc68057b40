"""One file per sharding engine: says what this rank holds of every parameter. Nothing else knows the engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from lightning_soo.placement.adapters import dense, dtensor, fsdp, zero
from lightning_soo.placement.layout import Layout

# asked in this order; the last one takes what is left
ADAPTERS: Mapping[str, ModuleType] = {"zero": zero, "fsdp": fsdp, "dtensor": dtensor, "dense": dense}


def read_layout(
    groups: Sequence[dict[str, Any]], model: nn.Module | None, constructed: Collection[int] = frozenset()
) -> Layout:
    """This rank's layout, by the adapter of the engine that holds the parameters.

    Args:
        groups: the optimizer's parameter groups.
        model: wrapped or not; FSDP1 and DeepSpeed hold the layout in their wrapper.
        constructed: ids of the parameters that the optimizer was built with; engines replace them.

    Raises:
        TypeError: a parameter that no engine here can handle, named, with what to do.
    """
    for adapter in ADAPTERS.values():
        if adapter.matches(groups, model, constructed):
            layout: Layout = adapter.read_layout(groups, model, constructed)
            return layout
    raise AssertionError("the dense adapter takes everything")
