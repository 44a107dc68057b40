"""One rank: the same run with every executor, with late, killed and failing workers; bit for bit."""

from __future__ import annotations

import copy
import os
import signal
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launching import leave
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_soo import RefreshError, Shampoo
from lightning_soo.preconditioners.kronecker import KroneckerStatistics

STEPS = 40
ROOT_JOB = KroneckerStatistics.root_job


def with_function(name: str) -> None:
    """Let every root be computed by this function."""

    def root_job(self: KroneckerStatistics, **options: Any) -> Any:
        return replace(ROOT_JOB(self, **options), function=name)

    KroneckerStatistics.root_job = root_job if name else ROOT_JOB


def train(rank: int, kill_every: int = 0, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    optimizer = Shampoo(
        model,
        lr=0.01,
        precondition_frequency={"first": 2, "growth": 1.5, "max": 6},
        start_preconditioning_step=3,
        preconditioner_eps=1e-3,
        **options,
    )
    optimizer.attach(model)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        executor = optimizer._refresher.executor
        if kill_every and step % kill_every == kill_every - 1 and getattr(executor, "processes", None):
            os.kill(executor.processes[step // kill_every % len(executor.processes)], signal.SIGKILL)
    owned = sum(block.statistics is not None for member in optimizer._members for block in member.blocks)
    assert not kill_every or not owned or executor.restarts > 0
    optimizer.close()
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


def copy_with_refreshes_in_flight() -> None:
    """A copy of one rank's optimizer lacks what the others have under way, until that is gathered."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = DistributedDataParallel(net)
    optimizer = Shampoo(
        model, lr=0.01, precondition_frequency=8, refresh_delay=6, start_preconditioning_step=2, stagger=False
    )
    optimizer.attach(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    assert optimizer._refresher.in_flight
    try:
        copy.deepcopy(optimizer)
    except RuntimeError as error:
        assert "consolidate(to=None)" in str(error), error
    else:
        raise AssertionError("a copy without the other rank's refreshes")
    optimizer.consolidate(to=None)
    copy.deepcopy((net, optimizer))[1].close()
    optimizer.close()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    sys.path.insert(0, str(Path(__file__).parent))  # workers find late_functions there

    reference = train(rank, workers="inline")
    for workers in ("thread", {"kind": "process", "count": 2, "max_restarts": 100}):
        assert torch.equal(train(rank, workers=workers), reference)
        with_function("late_functions:late_roots")
        assert torch.equal(train(rank, workers=workers), reference), f"late {workers}"
        with_function("")
    killed = {"kind": "process", "count": 1, "max_restarts": 100}
    assert torch.equal(train(rank, kill_every=5, workers=killed), reference)

    copy_with_refreshes_in_flight()

    # one block fails on the one rank that refreshes it: all ranks raise the same error at the same step
    with_function("late_functions:failing_roots")
    try:
        train(rank, workers={"kind": "process", "count": 1, "max_failures": 3})
    except RefreshError as error:
        (out / f"error{rank}.txt").write_text(str(error))
    else:
        raise AssertionError("a block that always fails raised nothing")
    leave()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
