"""Whole runs whose worker processes are killed: the parameters are those of a run nobody disturbed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from test_processes import wait_until
from torch import nn

from lightning_soo import Shampoo
from lightning_soo.optim.refreshing import Refresher
from lightning_soo.refresh.processes import ProcessExecutor

WORKERS = {"kind": "process", "count": 2, "max_restarts": 100}
FREQUENCY, DELAY = 3, 2  # 50 is no multiple of 3: kills fall on every phase of a refresh


def train(steps: int, workers: Any, before_step: Callable[[int, Refresher], None] | None = None) -> torch.Tensor:
    """The parameters after some steps; ``before_step`` is called before each one but the first."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20))
    optimizer = Shampoo(
        net,
        lr=0.01,
        precondition_frequency=FREQUENCY,
        refresh_delay=DELAY,
        stagger=False,  # between two refreshes nothing is in flight
        start_preconditioning_step=2,
        workers=workers,
    )
    for step in range(1, steps + 1):
        if before_step is not None and step > 1:
            assert optimizer._refresher is not None
            before_step(step, optimizer._refresher)
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - x[:, :20].sin()).square().mean().backward()
        optimizer.step()
    assert optimizer.diagnostics()["condition_number"] > 1  # preconditioned
    optimizer.close()
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


def test_workers_killed_every_50_steps_end_with_the_parameters_of_an_undisturbed_run() -> None:
    steps, killed = 330, []

    def kill(step: int, refresher: Refresher) -> None:
        executor = refresher.executor
        assert isinstance(executor, ProcessExecutor)
        if step % 50 == 0:
            for pid in executor.processes:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        if step == steps:  # every kill was noticed, once, and its worker replaced
            wait_until(lambda: executor.poll() or executor.restarts == len(killed))
            assert not set(killed) & set(executor.processes)

    disturbed = train(steps, WORKERS, kill)
    assert len(killed) == 12
    assert torch.equal(disturbed, train(steps, WORKERS))
    assert torch.equal(disturbed, train(steps, "inline"))
