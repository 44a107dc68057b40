"""Worker processes: the same bits as inline, their start and their end. Faults are in tests/faults/test_workers.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_jobs import alive, other_job, root_job, wait_until

from lightning_soo.refresh.arena import Arena
from lightning_soo.refresh.executors import InlineExecutor, ThreadExecutor
from lightning_soo.refresh.processes import ProcessExecutor


@pytest.fixture
def executor() -> Any:
    found = ProcessExecutor(2, deadline=20.0)
    yield found
    found.close()


def test_the_bits_are_those_of_inline(executor: ProcessExecutor) -> None:
    inline, thread, deferred = InlineExecutor(), ThreadExecutor(2), ThreadExecutor(2, deferred=True)
    jobs = {seed: root_job(20 + 13 * seed, seed) for seed in range(12)}
    for each in (executor, inline, thread, deferred):
        for key, job in jobs.items():
            each.submit(key, job)
    for key in reversed(jobs):
        found = [each.result(key) for each in (executor, inline, thread, deferred)]
        assert not found[0].error and found[0].diagnostics == found[1].diagnostics
        for arrays in zip(*(result.arrays for result in found), strict=True):
            assert all(np.array_equal(arrays[0], other) for other in arrays[1:])
    assert executor.queued == 0 and executor.restarts == 0
    thread.close()
    deferred.close()


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


def test_killed_while_idle_is_replaced_at_the_next_poll(executor: ProcessExecutor) -> None:
    executor.submit("a", other_job("double"))
    executor.result("a")
    os.kill(executor.processes[1], signal.SIGKILL)
    wait_until(lambda: executor.poll() or executor.restarts)  # its first thread is gone before its pipe is closed
    assert executor.restarts == 1 and all(map(alive, executor.processes))


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


def test_pipes_may_have_numbers_above_those_of_select() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("no more than 2048 descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    executor = ProcessExecutor(1)
    try:
        executor.submit(0, root_job(20, 0))
        executor.poll()
        assert not executor.result(0).error
    finally:
        executor.close()
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
