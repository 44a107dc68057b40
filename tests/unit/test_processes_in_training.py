"""Whole runs whose worker processes are killed or starved: the parameters are those of a run nobody disturbed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from worker_jobs import wait_until

from lightning_soo import Shampoo
from lightning_soo.optim.refreshing import Refresher
from lightning_soo.refresh.processes import ProcessExecutor

WORKERS = {"kind": "process", "count": 2, "max_restarts": 100}
FREQUENCY, DELAY = 3, 2  # 50 is no multiple of 3: kills fall on every phase of a refresh
# ends by itself, so that nothing spins on if the test itself is killed
BUSY = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


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


def test_starved_workers_end_with_the_parameters_of_an_undisturbed_run() -> None:
    """Stopped and continued at random, and niced against a process that spins on their core; never replaced."""
    core, steps = min(os.sched_getaffinity(0)), 80
    held, late, stack = 0, 0, contextlib.ExitStack()
    stopper: Stopper | None = None

    def starve(step: int, refresher: Refresher) -> None:
        nonlocal held, late, stopper
        executor = refresher.executor
        assert isinstance(executor, ProcessExecutor) and executor.restarts == 0
        if step == 10:  # the workers have started and have given their first roots
            stack.enter_context(busy(core))
            stopper = stack.enter_context(Stopper(executor.processes))
        if step == steps:  # before the workers are told to end
            stack.close()
        if stopper is None or step == steps:
            return
        executor.poll()
        # what was started while all workers stood still cannot be ready when its step comes
        due = [entry for entry in refresher.in_flight if entry.swap == step and entry.started >= held > 0]
        if due:
            assert all(executor._tasks[entry.key, entry.started].answer is None for entry in due)
            late, held = late + len(due), 0
            stopper.release()
        elif not held and not refresher.in_flight and refresher.schedule.refreshes("", step):
            stopper.hold()
            held = step

    with stack:
        disturbed = train(steps, {**WORKERS, "cpus": [core], "nice": 10}, starve)
    assert late == 2 * len(range(12, 78, FREQUENCY))  # both blocks, every refresh
    assert torch.equal(disturbed, train(steps, WORKERS))
    assert torch.equal(disturbed, train(steps, "inline"))


@contextlib.contextmanager
def busy(core: int) -> Iterator[None]:
    """A process that takes whatever it can get of one core."""
    process = subprocess.Popen([sys.executable, "-S", "-c", BUSY])
    try:
        os.sched_setaffinity(process.pid, [core])
        yield
    finally:
        process.kill()
        process.wait()


class Stopper:
    """A thread that stops processes for most of the time, at random; all of them go on when it ends."""

    def __init__(self, pids: list[int], seed: int = 0) -> None:
        self._pids, self._chance = pids, random.Random(seed)
        self._lock, self._held, self._ended = threading.Lock(), False, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Stopper:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self.release()

    def hold(self) -> None:
        """Stop all of them until :meth:`release`; returns when they stand still."""
        with self._lock:
            self._held = True
            self._send(signal.SIGSTOP, self._pids)
        for pid in self._pids:
            wait_until(lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")

    def release(self) -> None:
        with self._lock:
            self._held = False
            self._send(signal.SIGCONT, self._pids)

    def _run(self) -> None:
        while not self._ended.is_set():
            some = [pid for pid in self._pids if self._chance.random() < 0.7]
            for number, longest in ((signal.SIGSTOP, 0.03), (signal.SIGCONT, 0.01)):
                with self._lock:
                    if not self._held:
                        self._send(number, some)
                time.sleep(self._chance.uniform(0.0, longest))

    @staticmethod
    def _send(number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            os.kill(pid, number)
