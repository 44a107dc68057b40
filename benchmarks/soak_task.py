"""What the soak trains: a small model in float64, batches by the step's number, Shampoo with refreshes in flight."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_soo import Shampoo

ENGINES = ("ddp", "fsdp2")
EXAMPLES, INPUTS, OUTPUTS = 12, 20, 6  # examples of a step: as many to each of 1, 2 or 3 ranks


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, OUTPUTS)]
    return nn.Sequential(*layers).double()


def make_batch(step: int, rank: int, ranks: int, *, broken: bool = False) -> tuple[Tensor, Tensor]:
    """This rank's examples of a step; of a ``broken`` one the first rank's have a NaN."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(EXAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    noise = torch.randn(EXAMPLES, OUTPUTS, generator=generator, dtype=torch.float64)
    targets = (2 * inputs[:, :OUTPUTS]).sin() * inputs[:, OUTPUTS : 2 * OUTPUTS] + 0.1 * noise
    if broken:
        inputs[0, 0] = float("nan")
    own = slice(rank * EXAMPLES // ranks, (rank + 1) * EXAMPLES // ranks)
    return inputs[own], targets[own]


def make_optimizer(model: nn.Module, workers: Any) -> Shampoo:
    """Refreshes are in flight at most steps: every 4, used 3 later, each block at a step of its own."""
    optimizer = Shampoo(
        model,
        lr=0.003,
        weight_decay=0.01,
        max_preconditioner_dim=12,
        precondition_frequency=4,
        refresh_delay=3,
        start_preconditioning_step=3,
        stagger=True,
        preconditioner_eps=1e-3,
        workers=workers,
    )
    optimizer.attach(model)
    return optimizer


def wrap(model: nn.Sequential, engine: str) -> nn.Module:
    """As the engine wants it; one process has none."""
    if not dist.is_initialized():
        return model
    if engine == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """By the bare model's names, on every rank. Collective under FSDP2."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    found = {}
    for name, parameter in module.named_parameters():
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name] = full.detach().clone()
    return found
