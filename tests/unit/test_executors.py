"""Deferred jobs: when they begin, and that cutting them into matrices changes nothing but who computes what."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from worker_jobs import ROOT, root_job, wait_until

from lightning_soo import SOAP, Shampoo
from lightning_soo.refresh import executors
from lightning_soo.refresh.executors import InlineExecutor, ThreadExecutor
from lightning_soo.refresh.jobs import Job, JobResult, one_blas_thread, run_job

Array = npt.NDArray[Any]


def test_deferred_jobs_begin_when_a_result_is_asked_for() -> None:
    deferred = ThreadExecutor(2, deferred=True)
    for seed in range(3):
        deferred.submit(seed, root_job(20, seed))
    time.sleep(0.2)
    assert deferred.queued == 3
    assert not deferred.result(1).error
    wait_until(lambda: deferred.queued == 0)  # all that had come began with it
    deferred.submit(7, root_job(20, 7))
    deferred.close()  # what nobody asked for is dropped
    assert deferred.queued == 0
    deferred.submit(8, root_job(20, 8))
    assert not deferred.result(8).error
    deferred.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The orders of the matrices of every call of an executor."""
    found: list[tuple[int, ...]] = []

    def counted(job: Job) -> JobResult:
        found.append(tuple(len(array) for array in job.arrays))
        return run_job(job)

    monkeypatch.setattr(executors, "run_job", counted)
    return found


def gram(order: int, seed: int, size: float = 1.0) -> Array:
    rows = np.random.default_rng(seed).standard_normal((order, 2 * order)).astype(np.float32)
    return size * (rows @ rows.T)


def roots(*matrices: Array, counts: list[int], **options: Any) -> Job:
    given = {"divisor": 3.0, "exponent": 2.7, "eps": 1e-6, "relative_eps": True, "counts": counts, **options}
    separate = "lightning_soo.linalg.inverse_roots:separate_roots"
    return Job(function=ROOT, separate=separate, arrays=matrices, options=given, result_bytes=0)


def bases(*matrices: Array) -> Job:
    module = "lightning_soo.linalg.eigenbases"
    return Job(
        function=f"{module}:eigenbases",
        separate=f"{module}:separate_bases",
        arrays=matrices,
        options={"tolerance": 1e-5},
        result_bytes=0,
    )


def inverses(*factors: Array) -> Job:
    function = "lightning_soo.linalg.damped_inverses:factored_inverses"
    return Job(function=function, arrays=factors, options={"damping": 1e-3}, result_bytes=0)


def computed_whole(job: Job) -> JobResult:
    inline = InlineExecutor()
    inline.submit("a", job)
    return inline.result("a")


BAD = np.full((60, 60), np.nan, np.float32)
ZERO = np.zeros((60, 60), np.float32)
# what is computed, and the matrices of each call
CASES: dict[str, tuple[Job, list[int]]] = {
    "roots": (roots(gram(60, 1), gram(50, 2), gram(40, 3), gram(70, 4), counts=[3, 1]), [1, 1, 1, 1]),
    "one is as small as the ridge": (roots(gram(60, 1), gram(60, 2, 1e-8), gram(60, 3), counts=[2, 1]), [3]),
    "one side is small, which has a ridge of its own": (roots(gram(60, 1), gram(60, 3, 1e-8), counts=[1, 1]), [1, 1]),
    "an absolute ridge": (roots(gram(60, 1), gram(60, 2, 1e-8), counts=[2], relative_eps=False), [1, 1]),
    "one part of a diagonal is zero": (roots(gram(60, 1), ZERO, gram(60, 3), counts=[2, 1]), [3]),
    "one side is zero": (roots(gram(60, 1), gram(60, 2), ZERO, counts=[2, 1]), [3]),
    "not finite": (roots(gram(60, 1), BAD, counts=[1, 1]), [2]),
    "a root that fails": (roots(gram(60, 1), gram(60, 2) - 1e3 * np.eye(60), counts=[1, 1], eps=0.0), [1, 1]),
    "bases": (bases(gram(60, 1), gram(50, 2), ZERO), [1, 1, 1]),
    "a basis that fails": (bases(gram(60, 1), BAD), [1, 1]),
    "factors share their damping": (inverses(gram(60, 1), gram(50, 2)), [2]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_job_that_is_cut_gives_what_it_gives_whole(name: str, calls: list[tuple[int, ...]]) -> None:
    job, expected = CASES[name]
    whole = computed_whole(job)
    calls.clear()
    deferred = ThreadExecutor(2, deferred=True)
    deferred.submit("a", job)
    cut = deferred.result("a")
    deferred.close()
    assert [len(call) for call in calls] == expected
    assert cut.error == whole.error and bool(whole.error) == ("fails" in name or "finite" in name)
    np.testing.assert_equal(dict(cut.diagnostics), dict(whole.diagnostics))
    assert len(cut.arrays) == len(whole.arrays)
    assert all(np.array_equal(one, other) for one, other in zip(cut.arrays, whole.arrays, strict=True))


@pytest.mark.parametrize("kind", [Shampoo, SOAP])
def test_training_cuts_its_refreshes_and_ends_the_same(kind: type[Shampoo], calls: list[tuple[int, ...]]) -> None:
    def train(workers: Any) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 3))
        optimizer = kind(net, lr=0.02, max_factor_dim=20, precondition_frequency=2, workers=workers)
        for step in range(12):
            x = torch.randn(50, 40, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        optimizer.close()
        return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])

    whole = train("inline")
    calls.clear()
    assert torch.equal(whole, train({"kind": "deferred", "count": 3}))
    assert sum(len(call) == 1 for call in calls) > 20


def test_only_jobs_that_are_large_beside_the_rest_are_cut(calls: list[tuple[int, ...]]) -> None:
    for count, expected in ((2, [(100,), (20, 20)]), (1, [(20, 20), (100, 100)])):
        deferred = ThreadExecutor(count, deferred=True)
        for seed in range(4):
            deferred.submit(seed, roots(gram(20, seed), gram(20, 9), counts=[1, 1]))
        deferred.submit("large", roots(gram(100, 5), gram(100, 6), counts=[1, 1]))
        assert not deferred.result("large").error
        deferred.close()
        assert sorted(set(calls)) == sorted(expected) and sum(map(len, calls)) == 10
        calls.clear()


def test_a_late_piece_is_computed_in_the_training_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job, given = roots(gram(60, 1), gram(50, 2), counts=[1, 1]), threading.Event()

    def late(piece: Job) -> JobResult:
        if len(piece.arrays) == 1:
            given.wait(30)
        return run_job(piece)

    monkeypatch.setattr(executors, "run_job", late)
    deferred = ThreadExecutor(2, deadline=0.05, deferred=True)
    deferred.submit("a", job)
    found, whole = deferred.result("a"), computed_whole(job)
    given.set()
    deferred.close()
    assert "refresh of a not ready" in caplog.text
    assert all(np.array_equal(one, other) for one, other in zip(found.arrays, whole.arrays, strict=True))


@pytest.mark.parametrize("deferred", [False, True])
def test_a_dropped_optimizers_threads_end_and_blas_is_as_before(deferred: bool) -> None:
    users, threads = one_blas_thread._users, set(threading.enumerate())
    executor = ThreadExecutor(2, deferred=deferred)
    executor.submit(0, root_job(20, 0))
    own = set(threading.enumerate()) - threads
    assert one_blas_thread._users == users + 1 and len(own) == 2
    del executor
    gc.collect()
    wait_until(lambda: not any(thread.is_alive() for thread in own))
    assert one_blas_thread._users == users


def test_a_refresh_of_a_parameter_that_is_frozen_meanwhile_holds_nothing() -> None:
    users = one_blas_thread._users
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    optimizer = Shampoo(
        net, lr=1e-3, precondition_frequency=10, refresh_delay=5, start_preconditioning_step=1, workers="thread"
    )
    for step in range(4):
        net[1].requires_grad_(step < 2)
        optimizer.zero_grad()
        net(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    assert len(optimizer._refresher.in_flight) == 1 and one_blas_thread._users == users
    optimizer.close()
