"""One rank: trains a small float64 model under DDP, checks agreement, saves and loads, writes its parameters."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from launching import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_soo import AgreementError, Shampoo

STEPS, BATCH = 20, 24


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def make_optimizer(model: nn.Module, **options: object) -> Shampoo:
    return Shampoo(
        model,
        lr=0.01,
        max_preconditioner_dim=8,
        precondition_frequency=4,
        start_preconditioning_step=3,
        preconditioner_eps=1e-3,
        **{"refresh_delay": 2, "workers": "thread", **options},
    )


def train(model: nn.Module, optimizer: Shampoo, rank: int, size: int, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 7, generator=generator, dtype=torch.float64)
        part = x[rank * BATCH // size : (rank + 1) * BATCH // size]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(part), part[:, :5].sin()).backward()
        optimizer.step()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    wrapped = DistributedDataParallel(make_model())
    optimizer = make_optimizer(wrapped)
    plan = optimizer.attach(wrapped)
    train(wrapped, optimizer, rank, size, 0, 11)
    optimizer.consolidate(to=0)
    saved = optimizer.state_dict()
    assert saved["second_order"]["complete"] == (rank == 0 or size == 1)
    if rank == 0:
        torch.save({"optimizer": saved, "model": wrapped.module.state_dict()}, out / "half.pt")
    train(wrapped, optimizer, rank, size, 11, STEPS)
    owned = [block for member in optimizer._members for block in member.blocks if block.statistics is not None]
    assert len(owned) == sum(unit.refresher == rank for unit in plan.units)
    torch.save([p.detach() for p in wrapped.module.parameters()], out / f"rank{rank}.pt")
    dist.barrier()

    # resumed here from the state above
    half = torch.load(out / "half.pt", weights_only=True)
    module = make_model()
    module.load_state_dict(half["model"])
    again = DistributedDataParallel(module)
    resumed = make_optimizer(again)
    resumed.attach(again)
    resumed.load_state_dict(half["optimizer"])
    train(again, resumed, rank, size, 11, STEPS)
    for a, b in zip(module.parameters(), wrapped.module.parameters(), strict=True):
        # from three ranks on a new DDP may sum gradients in another order, so this is a tolerance, not equality
        assert (a - b).abs().max() <= 1e-12

    # one rank configured differently: every rank is told, none hangs
    if size > 1:
        different = make_optimizer(make_model(), refresh_delay=rank)
        try:
            different.attach()
        except AgreementError as error:
            others = str(list(range(1, size)))
            expected = f"the configuration of rank {others} differs from rank 0's: refresh_delay=1 on rank 1, "
            assert f"{expected}refresh_delay=0 on rank 0" in str(error), error
        else:
            raise AssertionError("a configuration that differs was accepted")
        wider = nn.Sequential(nn.Linear(4, 4 + rank // (size - 1)), nn.Linear(4, 2))
        try:
            make_optimizer(wider).attach()
        except AgreementError as error:
            assert f"'0.weight' of shape (5, 4), torch.float32, part 0 on rank {size - 1}" in str(error), error
            assert "'0.weight' of shape (4, 4), torch.float32, part 0 on rank 0" in str(error), error
        else:
            raise AssertionError("a parameter of another shape was accepted")
    optimizer.close()
    resumed.close()
    leave()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
