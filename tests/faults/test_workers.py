"""Faults of the background workers, each really provoked; numbers are the rows of docs/reliability.md."""

from __future__ import annotations

import copy
import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launched_programs import PROGRAMS, command_of
from torch import nn
from worker_jobs import alive, other_job, processor_ticks, root_job, wait_until

from lightning_soo import RefreshError, Shampoo
from lightning_soo.optim.outcomes import Outcome
from lightning_soo.placement.blocks import ArrayLayout
from lightning_soo.preconditioners.kronecker import KroneckerStatistics
from lightning_soo.refresh.executors import InlineExecutor, ThreadExecutor
from lightning_soo.refresh.jobs import run_job
from lightning_soo.refresh.processes import ProcessExecutor
from lightning_soo.refresh.schedule import RefreshSchedule

WITHOUT_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def train(steps: int, before_step: Callable[[int, Shampoo], None] | None = None, **options: Any) -> torch.Tensor:
    """The parameters after some steps with one block, which is refreshed at steps 2, 4, 8, 12 and so on."""
    torch.manual_seed(0)
    net = nn.Linear(12, 12, bias=False)
    settings = {"lr": 0.01, "precondition_frequency": 4, "start_preconditioning_step": 2, "stagger": False, **options}
    optimizer = Shampoo(net, refresh_delay=3, **settings)
    for step in range(1, steps + 1):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - x.sin()).square().mean().backward()
        if before_step is not None:
            before_step(step, optimizer)
        optimizer.step()
    optimizer.close()
    return net.weight.detach()


def roots_of(optimizer: Shampoo) -> list[torch.Tensor] | None:
    (block,) = optimizer._refresher.blocks.values()
    return block.roots


def test_row_01_killed_during_a_root() -> None:
    """Its jobs are computed anew, with the same bits, and a job that another worker had is not disturbed."""
    executor = ProcessExecutor(2, deadline=60.0)
    for key in range(2):
        executor.submit(key, root_job(8))
        executor.result(key)
    victim = executor.processes[0]
    idle = processor_ticks(victim)
    for key in range(3):
        executor.submit(key, root_job(700, key))
    wait_until(lambda: processor_ticks(victim) > idle + 2)  # in the decomposition itself
    assert executor._tasks[0].answer is None
    os.kill(victim, signal.SIGKILL)
    inline = InlineExecutor()
    for key in range(3):
        inline.submit(key, root_job(700, key))
        assert all(map(np.array_equal, executor.result(key).arrays, inline.result(key).arrays))
    assert executor.restarts == 1 and victim not in executor.processes
    executor.close()


def test_row_01_the_previous_root_is_used_meanwhile() -> None:
    previous: Any = None

    def kill(step: int, optimizer: Shampoo) -> None:
        nonlocal previous
        executor = optimizer._refresher.executor if optimizer._refresher is not None else None
        if step == 9:  # step 8 has started a refresh for step 11; without an answer, since its worker stood still
            previous = roots_of(optimizer)
            assert previous is not None and [entry.started for entry in optimizer._refresher.in_flight] == [8]
            os.kill(executor.processes[0], signal.SIGKILL)
        if step == 8:
            os.kill(executor.processes[0], signal.SIGSTOP)
        if step in (10, 11):
            assert roots_of(optimizer) is previous
        if step == 12:
            assert roots_of(optimizer) is not previous and executor.restarts == 1

    disturbed = train(14, kill, workers={"kind": "process", "count": 1})
    assert torch.equal(disturbed, train(14, workers="inline"))


def test_row_02_a_hanging_worker_is_replaced_at_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
    executor = ProcessExecutor(1, deadline=1.0)
    executor.submit("a", other_job("double"))
    executor.result("a")
    stopped = executor.processes[0]
    os.kill(stopped, signal.SIGSTOP)
    executor.submit("b", root_job(30))
    with caplog.at_level(logging.WARNING):
        found = executor.result("b")
    assert np.array_equal(found.arrays[0], run_job(root_job(30)).arrays[0])
    assert "not ready" in caplog.text and not alive(stopped) and executor.restarts == 1
    executor.close()


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_row_02_then_the_trainer_computes_it(caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """Two deadlines of processes that are slow, one of a thread."""
    executor: Any = ProcessExecutor(1, deadline=0.3) if kind == "process" else ThreadExecutor(1, deadline=0.3)
    # a worker's function runs in the main thread of its process
    executor.submit("a", other_job("slow" if kind == "process" else "slow_elsewhere", seconds=0.8))
    with caplog.at_level(logging.WARNING):
        assert executor.result("a").arrays[0][2, 3] == 22.0
    assert executor.restarts == (2 if kind == "process" else 0) and "not ready" in caplog.text
    wait_until(lambda: executor.queued == 0)
    executor.submit("b", root_job(10))
    assert np.array_equal(executor.result("b").arrays[0], run_job(root_job(10)).arrays[0])
    executor.close()


def test_row_03_dying_again_and_again_ends_in_the_trainer(caplog: pytest.LogCaptureFixture) -> None:
    executor = ProcessExecutor(2, max_restarts=3, deadline=20.0)
    with caplog.at_level(logging.WARNING):
        for key in range(3):
            executor.submit(key, other_job("die"))
        assert [executor.result(key).arrays[0][2, 3] for key in range(3)] == [22.0] * 3
    assert executor.processes == [] and caplog.text.count("from now on") == 1
    executor.submit("b", root_job(20))
    assert np.array_equal(executor.result("b").arrays[0], run_job(root_job(20)).arrays[0])
    executor.close()


@pytest.mark.parametrize(("name", "message"), [("not_finite", "NaN"), ("wrong_shape", "shapes"), ("fail", "as asked")])
def test_row_04_a_bad_result_is_not_a_root(name: str, message: str) -> None:
    executor = ProcessExecutor(1, deadline=20.0)
    executor.submit("a", other_job(name))
    outcome = Outcome.of(executor.result("a"), (ArrayLayout((4, 4)),), torch.float32)
    assert outcome.roots is None and message in outcome.error
    assert executor.restarts == 0
    executor.close()


@pytest.mark.parametrize("kind", ["inline", "thread", "process"])
@pytest.mark.parametrize("function", ["fail", "not_finite", "wrong_shape"])
def test_row_04_the_previous_root_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, function: str
) -> None:
    """As in a run whose schedule lacks that refresh; three in a row are an error that says what to do."""
    original, schedule = KroneckerStatistics.root_job, RefreshSchedule.refreshes
    workers = {"kind": kind, "max_failures": 3}
    with monkeypatch.context() as patch:
        patch.setattr(RefreshSchedule, "refreshes", lambda self, key, step: step != 8 and schedule(self, key, step))
        expected = train(16, workers="inline")
    assert not torch.equal(expected, train(16, workers="inline"))
    failing, calls = {2}, 0  # the one of step 8

    def root_job(self: KroneckerStatistics, **given: Any) -> Any:
        nonlocal calls
        job = original(self, **given)
        calls += 1
        return replace(job, function=f"job_functions:{function}", options={}) if calls - 1 in failing else job

    monkeypatch.setattr(KroneckerStatistics, "root_job", root_job)
    with caplog.at_level(logging.WARNING):
        found = train(16, workers=workers)
    assert calls == 5 and torch.equal(found, expected)
    assert caplog.text.count("weight/0:12x0:12 started at step 8 failed (1 in a row)") == 1
    assert caplog.text.count("the previous root stays in use") == 1
    failing, calls = {1, 2, 3}, 0
    with pytest.raises(RefreshError, match=r"weight/0:12x0:12: 3 refreshes in a row.*preconditioner_eps, or exclude"):
        train(30, workers=workers)


@pytest.mark.parametrize("how", ["kill", "exception", "exit"])
def test_row_05_workers_and_memory_go_with_the_trainer(tmp_path: Path, how: str) -> None:
    """In the middle of a computation, and with a forked child that holds the pipe open."""
    ending = {"kill": "os.kill(os.getpid(), 9)", "exception": "raise SystemError", "exit": "sys.exit(0)"}[how]
    script = tmp_path / "trainer.py"
    script.write_text(
        f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from worker_jobs import other_job
from lightning_soo.refresh.processes import ProcessExecutor
executor = ProcessExecutor(2)
for key in range(4):
    executor.submit(key, other_job("spin", seconds=60.0))
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(0.5)
print(child, os.fstat(executor._arena.descriptor).st_ino, *executor.processes, flush=True)
sys.stdin.readline()
{ending}
"""
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    run = subprocess.Popen([sys.executable, str(script)], **pipes, text=True)
    assert run.stdout is not None and run.stdin is not None
    child, memory, *workers = (int(word) for word in run.stdout.readline().split())
    try:
        assert len(workers) == 2 and set(holders(memory)) == {run.pid, child, *workers}
        for pid in workers:  # what they share has no name that could outlive them
            assert "/dev/shm" not in Path(f"/proc/{pid}/maps").read_text()
        run.stdin.close()
        run.wait(timeout=30)
        wait_until(lambda: not any(map(alive, workers)), seconds=5.0)
    finally:
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: not holders(memory))
    run.stdout.close()


def holders(memory: int) -> list[int]:
    """Processes with an open descriptor of the shared memory with this inode."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if "memfd:lightning_soo" in os.readlink(entry) and entry.stat().st_ino == memory:
                found.append(int(entry.parts[2]))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "launcher", [pytest.param(name, marks=WITHOUT_DEEPSPEED if name == "deepspeed" else ()) for name in PROGRAMS]
)
def test_row_06_the_program_runs_once_per_rank(tmp_path: Path, launcher: str) -> None:
    """A script without a main guard, which multiprocessing's spawn would run again in every worker."""
    script = tmp_path / "user.py"
    program, ranks = PROGRAMS[launcher]
    script.write_text(program)
    run = subprocess.run(
        [sys.executable, *command_of(launcher, script)],
        input=program if launcher == "stdin" else None,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = sorted(line for line in run.stdout.splitlines() if line.startswith(("running", "done")))
    assert lines == sorted(f"{word} {rank}" for word in ("running", "done") for rank in range(ranks))


def test_row_07_nothing_is_left_when_it_ends_with_jobs_in_flight() -> None:
    """Processes, descriptors and shared memory, after close and after garbage collection."""

    def descriptors() -> set[str]:
        return {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()}

    gc.collect()
    before = descriptors()
    for ending in ("close", "collect"):
        executor = ProcessExecutor(2)
        for key in range(4):
            executor.submit(key, other_job("spin", seconds=30.0))
        workers = executor.processes
        assert all(map(alive, workers)) and executor.queued == 4
        if ending == "close":
            executor.close()
        else:
            del executor
            gc.collect()
        wait_until(lambda workers=workers: not any(map(alive, workers)))
        gc.collect()
        assert not [name for name in descriptors() - before if "lightning_soo" in name or "pipe" in name]


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_row_08_results_of_before_a_restore_are_dropped(kind: str) -> None:
    """State is loaded, and a group added, while refreshes are in flight: as if they had never been started."""

    def run(net: nn.Module, optimizer: Shampoo, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            net(torch.randn(4, 60, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()

    found = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        net, extra = nn.Linear(60, 60), nn.Parameter(torch.ones(3, 3))
        options = {"precondition_frequency": 3, "start_preconditioning_step": 2, "refresh_delay": 2}
        optimizer = Shampoo(net, **options, workers={"kind": kind, "count": 2})
        run(net, optimizer, 0, 6)
        if disturbed:
            weights = {name: value.clone() for name, value in net.state_dict().items()}
            state = copy.deepcopy(optimizer.state_dict())
            run(net, optimizer, 6, 9)
            assert optimizer.diagnostics()["refreshes_in_flight"] > 0
            net.load_state_dict(weights)
            optimizer.load_state_dict(state)
        run(net, optimizer, 6, 9)
        optimizer.add_param_group({"params": [("extra", extra)]})
        run(net, optimizer, 9, 15)
        optimizer.close()
        found.append(torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()]))
    assert torch.equal(*found)
