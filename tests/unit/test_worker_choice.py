"""Which workers are chosen, from which cores, and what is said when they cannot keep up."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_soo import Shampoo, WorkerOptions
from lightning_soo.refresh import workers
from lightning_soo.refresh.cores import available_cores
from lightning_soo.refresh.executors import InlineExecutor
from lightning_soo.refresh.workers import Machine, make_executor
from lightning_soo.transport import Transport


@pytest.mark.parametrize(
    ("cores", "machine", "delay", "milliseconds", "kind", "count"),
    [
        (2, Machine(trainer_cores=2), None, 500.0, "deferred", 2),  # a laptop: no core is spare
        (2, Machine(trainer_cores=1), None, 500.0, "process", 1),
        (2, Machine(trainer_cores=1, data_workers=1), None, 500.0, "deferred", 2),
        (96, Machine(ranks=8, trainer_cores=1, data_workers=4), None, 500.0, "process", 7),  # beside GPUs
        (96, Machine(trainer_cores=1), None, 500.0, "process", 8),
        (96, Machine(ranks=8, trainer_cores=1), None, 0.5, "inline", 0),  # tiny blocks
        (2, Machine(trainer_cores=2), 0, 500.0, "deferred", 2),  # the step waits anyway
        (2, Machine(ranks=2, trainer_cores=1), 0, 500.0, "inline", 0),
        (1, Machine(ranks=4), 3, 500.0, "deferred", 1),
    ],
)
def test_automatic_choice(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    machine: Machine,
    delay: int | None,
    milliseconds: float,
    kind: str,
    count: int,
) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: cores)
    found, reason = make_executor(WorkerOptions(), machine, refresh_milliseconds=milliseconds, refresh_delay=delay)
    assert found.kind == kind and reason
    assert found.count == (count if kind != "inline" else 1)


def test_without_shared_memory_threads_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    options = WorkerOptions(kind="process", count=3)
    with caplog.at_level(logging.WARNING):
        found, _ = make_executor(options, Machine(), refresh_milliseconds=500.0, refresh_delay=None)
    assert found.kind == "thread" and "Linux" in caplog.text


@pytest.mark.parametrize(
    ("files", "group", "expected"),
    [
        ({"cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, "0::/a", 1.5),
        ({"a/cpu.max": "max 100000", "a/b/cpu.max": "400000 100000"}, "0::/a/b", 4.0),
        ({"cpu,cpuacct/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
         "4:cpu,cpuacct:/x", 3.0),
        ({"cpu,cpuacct/x/cpu.cfs_quota_us": "-1", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
         "4:cpu,cpuacct:/x", 1e9),
        ({"memory/x/cpu.max": "100000 100000"}, "4:memory:/x", 1e9),
        ({}, "nothing", 1e9),
    ],
)  # fmt: skip
def test_quotas_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], group: str, expected: float
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    membership = tmp_path / "self"
    if group != "nothing":
        membership.write_text(group + "\n")
    assert available_cores(tmp_path / "cgroup", membership) == min(64, max(1, int(expected)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "proces"}, "process"), ({"counts": 2}, "count"), ({"count": 0}, "count=0"),
        ({"threads_per_worker": 0}, "threads_per_worker=0"), ({"nice": -1}, "nice=-1"), ({"cpus": []}, "at least one"),
        ({"cpus": [100_000]}, "100000"), ({"deadline": 0}, "deadline=0"), ({"max_restarts": -1}, "max_restarts=-1"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerOptions.parse(options)


def train(monkeypatch: pytest.MonkeyPatch, function: str, steps: int = 40, **options: Any) -> Shampoo:
    """A run whose roots are computed by a function of job_functions."""
    from dataclasses import replace

    from lightning_soo.preconditioners.kronecker import KroneckerStatistics

    original = KroneckerStatistics.root_job

    def root_job(self: KroneckerStatistics, **given: Any) -> Any:
        return replace(
            original(self, **given),
            function=f"job_functions:{function}",
            options={"seconds": 0.15} if function == "slow" else {},
        )

    monkeypatch.setattr(KroneckerStatistics, "root_job", root_job)
    torch.manual_seed(0)
    net = nn.Linear(6, 6)
    options = {"precondition_frequency": 2, **options}
    optimizer = Shampoo(net, start_preconditioning_step=1, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_refreshes_that_cannot_keep_up_are_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    with caplog.at_level(logging.WARNING):
        optimizer = train(monkeypatch, "slow", workers=kind)
    assert caplog.text.count("cannot keep up") == 1 and "precondition_frequency (2)" in caplog.text
    assert "lower max_factor_dim" in caplog.text
    assert optimizer.diagnostics()["refresh_wait_seconds"] > 0.1
    optimizer.close()


def test_what_is_waited_for_while_the_interval_grows_passes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        growing = {"first": 2, "growth": 1.01, "max": 100}
        optimizer = train(monkeypatch, "slow", workers="thread", precondition_frequency=growing)
    assert "cannot keep up" not in caplog.text and optimizer.diagnostics()["refresh_wait_seconds"] > 0.1
    optimizer.close()


def test_a_result_that_was_saved_in_flight_is_used_in_the_dtype_of_the_run_that_loads_it() -> None:
    """Saved by a run in float64, loaded by one in float32: its roots are rounded when they are swapped in."""

    def make(dtype: torch.dtype) -> tuple[nn.Module, Shampoo]:
        torch.manual_seed(0)
        net = nn.Linear(12, 12).to(dtype)
        options = {"precondition_frequency": 4, "start_preconditioning_step": 2, "refresh_delay": 2}
        return net, Shampoo(net, **options, workers="inline")

    def run(net: nn.Module, optimizer: Shampoo, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            inputs = torch.randn(4, 12, generator=torch.Generator().manual_seed(step)).to(net.weight.dtype)
            net(inputs).square().mean().backward()
            optimizer.step()

    net, optimizer = make(torch.float64)
    first = 0
    while not optimizer.diagnostics().get("refreshes_in_flight"):
        run(net, optimizer, first, first + 1)
        first += 1
        assert first < 12
    other, again = make(torch.float32)
    other.load_state_dict(net.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(net, optimizer, first, first + 4)
    run(other, again, first, first + 4)
    block = next(iter(again._refresher.blocks.values()))
    assert {root.dtype for root in block.roots} == {torch.float32}
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-4, atol=1e-5)


def test_ranks_that_are_bound_to_cores_of_their_own_do_not_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = Transport()
    shared, bound = range(8), {0: range(4), 1: range(4, 8)}

    def gathered(of: Callable[[int], range]) -> int:
        """Of rank 0, where the others say what they would."""
        numbers = []
        for rank in (1, 0):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, rank=rank: set(of(rank)))
            monkeypatch.setattr(transport, "all_gather_integers", lambda own, what: numbers.append(own) or numbers)
            found = transport.ranks_on_these_cores()
        return found

    assert gathered(lambda rank: shared) == 2
    assert gathered(lambda rank: bound[rank]) == 1


def test_parameters_that_are_unfrozen_get_workers_of_their_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4))
    net[0].requires_grad_(False)
    optimizer = Shampoo(net, lr=1e-3, max_factor_dim=None, precondition_frequency=2, start_preconditioning_step=1)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            net(torch.randn(8, 300)).square().mean().backward()
            optimizer.step()

    optimizer.attach()
    optimizer._refresher.background._make_executor = InlineExecutor  # as for a head that takes no time
    train(4)
    net[0].requires_grad_(True)
    train(4)
    executor = optimizer._refresher.executor
    assert executor.kind != "inline" and executor.kind.split()[0] in ("deferred", "process", "thread")
    assert "in the step (all blocks" not in optimizer.plan_table()
    assert all(block.ready for member in optimizer._members for block in member.blocks)
    optimizer.close()
