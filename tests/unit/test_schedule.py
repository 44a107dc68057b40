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
from lightning_soo.refresh.schedule import Interval, RefreshSchedule


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
            "precondition_frequency": st.one_of(st.integers(1, 7), st.just({"first": 1, "growth": 1.6, "max": 5})),
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
    assert torch.equal(inline, train({"kind": "deferred", "count": 2}, **options))
    assert torch.equal(inline, train({"kind": "process", "count": 2}, **options))


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
        interval=Interval.parse(frequency), delay=delay, start=start, gather=gather, offsets={"a": offset % frequency}
    )
    steps = [step for step in range(1, start + 6 * frequency) if schedule.refreshes("a", step)]
    assert steps[0] == start and steps == schedule.refresh_steps("a", start + 6 * frequency - 1)
    gaps = [b - a for a, b in pairwise(steps)]
    assert all(gap == frequency for gap in gaps[1:])
    assert not gaps or ((gaps[0] >= frequency / 2 or offset % frequency == 0) and gaps[0] < 2 * frequency)
    for step in steps:
        swap = schedule.swap_step(step)
        assert swap % gather == 0 and step + delay <= swap < step + delay + gather


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    first=st.integers(1, 20),
    growth=st.floats(1.05, 3.0),
    longest=st.integers(0, 100),
    start=st.integers(1, 60),
    share=st.floats(0.0, 0.999),
    delay=st.one_of(st.none(), st.integers(0, 30)),
)
def test_a_growing_interval(
    first: int, growth: float, longest: int, start: int, share: float, delay: int | None
) -> None:
    """Intervals are first, first * growth, ... to the longest; every block is refreshed once in each of them."""
    longest = first + longest
    interval = Interval(first=first, growth=growth, max=longest)
    last = start + 8 * longest
    plain = RefreshSchedule(interval=interval, delay=delay, start=start, offsets={})
    begins = [step for step in range(1, last) if plain.refreshes("a", step)]
    expected, length = [start], float(first)
    while expected[-1] < last:
        expected.append(expected[-1] + min(longest, round(length)))
        length = min(length * growth, 1e6)
    if first < longest:
        assert begins == [step for step in expected if step < last]
    staggered = RefreshSchedule(interval=interval, delay=delay, start=start, offsets={"a": int(share * longest)})
    steps = [step for step in range(1, last) if staggered.refreshes("a", step)]
    assert steps == staggered.refresh_steps("a", last - 1)
    if first < longest:
        for begin, end in pairwise(begins[1:]):
            assert sum(begin <= step < end for step in steps) == 1
        swaps = [plain.swap_step(step) for step in begins]
        assert swaps == sorted(swaps)
        if delay is None:  # the first roots at once, then an eighth of the interval later
            eighths = [begin + max(1, (end - begin) // 8) for begin, end in pairwise(begins)]
            assert swaps[: len(begins) - 1] == [start, *eighths[1:]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "0"), (2.5, "2.5"), (True, "True"), ({"first": 5}, "'growth' is missing"),
        ({"first": 5, "grow": 2, "max": 9}, "growth"), ({"first": 5, "growth": 0.5, "max": 9}, "0.5"),
        ({"first": 5, "growth": 1.0, "max": 9}, "never reaches"), ({"first": 9, "growth": 2, "max": 5}, "below"),
    ],
)  # fmt: skip
def test_bad_intervals_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Interval.parse(value)
