"""The clock: random schedules, with executors that answer in any order and late, give the same bits."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_soo import Shampoo
from lightning_soo.refresh import executors
from lightning_soo.refresh.jobs import run_job
from lightning_soo.refresh.schedule import RefreshSchedule


def train(workers: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4))
    optimizer = Shampoo(net, lr=0.02, max_preconditioner_dim=5, workers=workers, **options)
    for step in range(16):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    optimizer.close()
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


@pytest.fixture(scope="module")
def late_jobs() -> Any:
    """Thread executors answer late, and so in another order than asked."""
    patch = pytest.MonkeyPatch()
    chance, lock = random.Random(0), threading.Lock()

    def late(job: Any) -> Any:
        with lock:
            delay = chance.choice([0.0, 0.0, 0.001, 0.004])
        time.sleep(delay)
        return run_job(job)

    patch.setattr(executors, "run_job", late)
    yield
    patch.undo()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    options=st.fixed_dictionaries(
        {
            "precondition_frequency": st.integers(1, 7),
            "refresh_delay": st.one_of(st.none(), st.integers(0, 9)),
            "stagger": st.booleans(),
            "gather_frequency": st.one_of(st.none(), st.integers(1, 4)),
            "statistics_frequency": st.integers(1, 3),
            "start_preconditioning_step": st.integers(1, 5),
        }
    )
)
def test_every_executor_gives_the_same_bits(late_jobs: Callable[[], None], options: dict[str, Any]) -> None:
    inline = train("inline", **options)
    assert torch.equal(inline, train({"kind": "thread", "count": 1}, **options))
    assert torch.equal(inline, train({"kind": "thread", "count": 3}, **options))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    frequency=st.integers(1, 50),
    delay=st.integers(0, 80),
    start=st.integers(1, 60),
    gather=st.integers(1, 12),
    offset=st.integers(0, 49),
)
def test_every_block_is_refreshed_once_an_interval(
    frequency: int, delay: int, start: int, gather: int, offset: int
) -> None:
    schedule = RefreshSchedule(
        frequency=frequency, delay=delay, start=start, gather=gather, offsets={"a": offset % frequency}
    )
    steps = [step for step in range(1, start + 6 * frequency) if schedule.refreshes("a", step)]
    assert steps[0] == start
    gaps = [b - a for a, b in pairwise(steps)]
    assert all(gap == frequency for gap in gaps[1:])
    assert not gaps or ((gaps[0] >= frequency / 2 or offset % frequency == 0) and gaps[0] < 2 * frequency)
    for step in steps:
        swap = schedule.swap_step(step)
        assert swap % gather == 0 and step + delay <= swap < step + delay + gather
