"""Which modules FSDP2 shards on their own, without the user writing ``configure_model``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_soo.placement.wrapping import modules_to_shard
from lightning_soo.transport import Transport


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    classes: Sequence[type[nn.Module] | str] | None = None,
    minimum_parameters: int | None = None,
    **options: Any,
) -> list[str]:
    """``fully_shard`` the modules that :func:`modules_to_shard` chooses, then the root. Collective.

    Args:
        model: sharded in place; one that is sharded already is left as it is.
        mesh: one dimension, or (replicate, shard).
        options: of ``fully_shard``.

    Returns:
        Names of the modules sharded below the root, inner ones first.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return []
    names = modules_to_shard(model, classes, minimum_parameters)
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return names


def start_alike(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0, as DDP does: a shard of other weights would go unnoticed."""
    transport = Transport()
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            if not tensor.is_meta:
                transport.share(tensor, "rank 0's weights")
