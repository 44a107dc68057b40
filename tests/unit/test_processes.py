"""Worker processes: the same bits as inline, and every fault by really killing, stopping and starving them."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_soo.optim.outcomes import Outcome
from lightning_soo.placement.blocks import ArrayLayout
from lightning_soo.refresh.arena import Arena
from lightning_soo.refresh.executors import InlineExecutor, ThreadExecutor
from lightning_soo.refresh.jobs import Job, run_job
from lightning_soo.refresh.processes import ProcessExecutor

sys.path.insert(0, str(Path(__file__).parent))
import job_functions  # noqa: F401 - found by workers through this path

ROOT = "lightning_soo.linalg.inverse_roots:inverse_roots"


def root_job(order: int, seed: int = 0) -> Job:
    matrix = np.random.default_rng(seed).standard_normal((order, order)).astype(np.float32)
    options = {"divisor": 1.0, "exponent": 4.0, "eps": 1e-6, "relative_eps": True}
    return Job(
        function=ROOT, arrays=(matrix @ matrix.T, matrix.T @ matrix), options=options, result_bytes=16 * order**2
    )


def other_job(name: str, **options: Any) -> Job:
    array = np.arange(16.0).reshape(4, 4)
    return Job(function=f"job_functions:{name}", arrays=(array,), options=options, result_bytes=array.nbytes)


@pytest.fixture
def executor() -> Any:
    found = ProcessExecutor(2, deadline=20.0)
    yield found
    found.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def test_the_bits_are_those_of_inline(executor: ProcessExecutor) -> None:
    inline, thread = InlineExecutor(), ThreadExecutor(2)
    jobs = {seed: root_job(20 + 13 * seed, seed) for seed in range(12)}
    for each in (executor, inline, thread):
        for key, job in jobs.items():
            each.submit(key, job)
    for key in reversed(jobs):
        found = [each.result(key) for each in (executor, inline, thread)]
        assert not found[0].error and found[0].diagnostics == found[1].diagnostics
        for arrays in zip(*(result.arrays for result in found), strict=True):
            assert np.array_equal(arrays[0], arrays[1]) and np.array_equal(arrays[0], arrays[2])
    assert executor.queued == 0 and executor.restarts == 0
    thread.close()


def test_arrays_are_copied_at_submit(executor: ProcessExecutor) -> None:
    for each in (executor, ThreadExecutor(1), InlineExecutor()):
        job = other_job("slow", seconds=0.05)
        before = job.arrays[0].copy()
        each.submit("a", job)
        job.arrays[0][...] = -1.0
        assert np.array_equal(each.result("a").arrays[0], 2 * before)
        each.close()


def test_more_jobs_than_a_pipe_holds(executor: ProcessExecutor) -> None:
    for key in range(500):
        executor.submit(key, other_job("double"))
    for key in range(500):
        assert executor.result(key).arrays[0][2, 3] == 22.0


def test_killed_during_a_job(executor: ProcessExecutor) -> None:
    for key in range(4):
        executor.submit(key, other_job("slow", seconds=0.3))
    victims = executor.processes
    os.kill(victims[0], signal.SIGKILL)
    assert [executor.result(key).arrays[0][2, 3] for key in range(4)] == [22.0] * 4
    assert executor.restarts == 1 and victims[0] not in executor.processes


def test_killed_while_idle_is_replaced_at_the_next_poll(executor: ProcessExecutor) -> None:
    executor.submit("a", other_job("double"))
    executor.result("a")
    os.kill(executor.processes[1], signal.SIGKILL)
    wait_until(lambda: executor.poll() or executor.restarts)  # its first thread is gone before its pipe is closed
    assert executor.restarts == 1 and all(map(alive, executor.processes))


def test_a_stopped_worker_is_replaced_at_the_deadline(caplog: pytest.LogCaptureFixture) -> None:
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


def test_two_deadlines_later_the_trainer_computes_it() -> None:
    """A job that is slow everywhere but in the trainer: here it is told to sleep longer than both deadlines."""
    executor = ProcessExecutor(1, deadline=0.3)
    executor.submit("a", other_job("slow", seconds=0.8))
    assert executor.result("a").arrays[0][2, 3] == 22.0
    assert executor.restarts == 2
    executor.submit("b", root_job(10))
    assert np.array_equal(executor.result("b").arrays[0], run_job(root_job(10)).arrays[0])
    executor.close()


def test_dying_again_and_again_ends_in_the_trainer(caplog: pytest.LogCaptureFixture) -> None:
    executor = ProcessExecutor(2, max_restarts=3, deadline=20.0)
    with caplog.at_level(logging.WARNING):
        for key in range(3):
            executor.submit(key, other_job("die"))
        assert [executor.result(key).arrays[0][2, 3] for key in range(3)] == [22.0] * 3
    assert executor.processes == [] and caplog.text.count("from now on") == 1
    executor.submit("b", root_job(20))
    assert np.array_equal(executor.result("b").arrays[0], run_job(root_job(20)).arrays[0])
    executor.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [("fail", "RuntimeError: as asked"), ("too_large", "announced"), ("missing", "AttributeError")],
)
def test_an_exception_is_a_result(executor: ProcessExecutor, name: str, message: str) -> None:
    executor.submit("a", other_job(name))
    found = executor.result("a")
    assert message in found.error and found.arrays == ()
    executor.submit("b", other_job("noisy"))
    assert executor.result("b").arrays[0][2, 3] == 22.0 and executor.restarts == 0


@pytest.mark.parametrize(("name", "message"), [("not_finite", "NaN"), ("wrong_shape", "shapes"), ("fail", "as asked")])
def test_a_bad_result_is_not_a_root(executor: ProcessExecutor, name: str, message: str) -> None:
    import torch

    executor.submit("a", other_job(name))
    outcome = Outcome.of(executor.result("a"), (ArrayLayout((4, 4)),), torch.float32)
    assert outcome.roots is None and message in outcome.error


def test_nothing_leaks(tmp_path: Path) -> None:
    """Processes, descriptors and shared memory, after close, after garbage collection, with jobs in flight."""

    def descriptors() -> set[str]:
        return {os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()}

    gc.collect()
    before = descriptors()
    for ending in ("close", "collect"):
        executor = ProcessExecutor(2)
        for key in range(4):
            executor.submit(key, other_job("spin", seconds=30.0))
        workers = executor.processes
        assert all(map(alive, workers))
        if ending == "close":
            executor.close()
        else:
            del executor
            gc.collect()
        wait_until(lambda workers=workers: not any(map(alive, workers)))
        gc.collect()
        assert not [name for name in descriptors() - before if "lightning_soo" in name or "pipe" in name]


@pytest.mark.parametrize("how", ["kill", "exception", "exit"])
def test_workers_die_with_the_trainer(tmp_path: Path, how: str) -> None:
    """In the middle of a computation, and with a forked child that holds the pipe open."""
    ending = {"kill": "os.kill(os.getpid(), 9)", "exception": "raise SystemError", "exit": "sys.exit(0)"}[how]
    script = tmp_path / "trainer.py"
    script.write_text(
        f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_processes as t
executor = t.ProcessExecutor(2)
for key in range(4):
    executor.submit(key, t.other_job("spin", seconds=60.0))
if os.fork() == 0:
    time.sleep(8)
    os._exit(0)
time.sleep(0.5)
print(*executor.processes, flush=True)
{ending}
"""
    )
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout is not None
    workers = [int(word) for word in run.stdout.readline().split()]
    assert len(workers) == 2
    run.wait(timeout=30)
    wait_until(lambda: not any(map(alive, workers)), seconds=5.0)
    run.stdout.close()


def test_the_users_program_runs_once(tmp_path: Path) -> None:
    """A script without a main guard, which multiprocessing's spawn would run again in every worker."""
    script = tmp_path / "user.py"
    script.write_text(
        """
print("running", flush=True)
import torch
from lightning_soo import Shampoo
net = torch.nn.Linear(30, 30)
optimizer = Shampoo(net, precondition_frequency=2, workers="process")
for step in range(8):
    optimizer.zero_grad()
    net(torch.randn(4, 30)).square().mean().backward()
    optimizer.step()
assert optimizer.diagnostics()["condition_number"] > 1
optimizer.close()
print("done", flush=True)
"""
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout.split() == ["running", "done"], run.stderr[-2000:]


def test_workers_are_ready_soon_and_small() -> None:
    executor = ProcessExecutor(1)
    started = time.monotonic()
    executor.submit("a", root_job(8))
    executor.result("a")
    assert time.monotonic() - started < 5.0  # a bound against hangs; the figure is in benchmarks/
    (pid,) = executor.processes
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))
    assert private < 100 * 1024, f"{private} KiB"
    executor.close()


def test_a_fork_does_not_touch_its_parents_workers() -> None:
    executor = ProcessExecutor(1)
    executor.submit("a", other_job("double"))
    child = os.fork()
    if child == 0:
        try:
            executor.submit("b", other_job("double"))
            ok = executor.result("b").arrays[0][2, 3] == 22.0
            executor.close()
        except BaseException:
            ok = False
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert executor.result("a").arrays[0][2, 3] == 22.0 and executor.restarts == 0
    executor.close()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 400_000)), max_size=40))
def test_regions_of_the_arena_never_overlap(moves: list[tuple[bool, int]]) -> None:
    arena, regions = Arena(), {}
    for take, size in moves:
        if take or not regions:
            offset = arena.allocate(size)
            assert offset + size <= arena.size
            assert all(offset + size <= other or other + length <= offset for other, length in regions.items() if size)
            regions[offset] = size
        else:
            offset = list(regions)[size % len(regions)]
            del regions[offset]
            arena.release(offset)
    for offset in list(regions):
        arena.release(offset)
    assert len(arena._free) <= 1 and not arena._taken
    arena.close()


def test_pinned_and_polite() -> None:
    core = sorted(os.sched_getaffinity(0))[-1]
    executor = ProcessExecutor(1, cpus=[core], nice=5)
    executor.submit("a", other_job("double"))
    executor.result("a")
    (pid,) = executor.processes
    assert os.sched_getaffinity(pid) == {core}
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + 5
    executor.close()
