"""The compiled step on the host against the separate functions of banded statistics, which test_banded.py checks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from banded_runs import Both, Pair, assert_equal, run_pairs, share_removed

from lightning_soo import SONew
from lightning_soo.preconditioners import banded_host
from lightning_soo.preconditioners.banded_host import HostRuns

pytestmark = pytest.mark.skipif(banded_host.load() is None, reason="no C++ compiler")


def run_both(n: int, bandwidth: int, chain_length: int, start: int = 0, *, steps: int = 8, **options: Any) -> Both:
    (both,) = run_pairs(HostRuns, [Pair(n, bandwidth, chain_length, start, **options)], steps)
    return both


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bandwidth", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("n", "chain_length", "start"),
    [
        (0, 5, 0),
        (1, 1, 0),
        (7, 3, 0),
        (7, 100, 0),
        (50, 1, 3),
        (50, 2, 1),
        (5003, 1003, 11),
        (40_000, 255, 0),
        (40_000, 10**7, 123),
        (300_000, 300_000, 0),  # with several threads in three phases
        (400_000, 150_000, 77),
    ],
)
def test_equals_the_separate_functions(bandwidth: int, n: int, chain_length: int, start: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal(run_both(n, bandwidth, chain_length, start, steps=4 if n > 10**5 else 12), 1e-10)
        assert_equal(run_both(n, bandwidth, chain_length, start, steps=3, per_chain=True), 1e-10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bandwidth", [1, 2, 4])
def test_edges_are_removed(bandwidth: int) -> None:
    """At a threshold that cuts most chains somewhere."""
    both = run_both(3000, bandwidth, 300, gamma=0.55)
    assert_equal(both, 1e-10)
    assert 0.02 < share_removed(both, 0.55) < 0.98


@pytest.mark.parametrize("bandwidth", [0, 1, 3])
def test_only_owned_elements_are_summed(bandwidth: int) -> None:
    assert_equal(run_both(2000, bandwidth, 10**6, 17, owned=(5, 1990)), 1e-10)
    assert_equal(run_both(2000, bandwidth, 10**6, 17, owned=(300, 300)), 1e-10)


@pytest.mark.parametrize("magnitude", [1e20, 1e-20])
@pytest.mark.parametrize("bandwidth", [0, 1, 2])
def test_extreme_gradients(bandwidth: int, magnitude: float) -> None:
    assert_equal(run_both(3000, bandwidth, 300, dtype=torch.float32, magnitude=magnitude), 2e-3)


@pytest.mark.parametrize(("outer", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("bandwidth", [0, 1, 2])
def test_single_and_half_precision(bandwidth: int, outer: torch.dtype, tolerance: float) -> None:
    assert_equal(run_both(3000, bandwidth, 300, dtype=torch.float32, outer=outer), tolerance)


@pytest.mark.parametrize("n", [0, 7, 100_003, 400_000])
def test_a_move_is_one_pass(n: int) -> None:
    parameter, moved = torch.randn(2, n, generator=torch.Generator().manual_seed(0)).unbind()
    parameter = parameter.clone().requires_grad_()
    product = parameter * parameter
    expected = 0.9 * parameter.detach().double() - 0.3 * moved.double()
    with torch.no_grad():
        assert banded_host.move(parameter, moved.clone(), shrink=0.9, alpha=-0.3)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    assert not banded_host.move(torch.zeros(4, 4).T[:2], torch.zeros(2, 4), shrink=1.0, alpha=1.0)
    assert not banded_host.move(torch.zeros(4).double(), torch.zeros(4).double(), shrink=1.0, alpha=1.0)


def test_what_it_cannot_do_is_refused() -> None:
    values = torch.zeros(10)
    assert not banded_host.is_possible(values, values, torch.zeros(6, 10))
    assert not banded_host.is_possible(values[::2], values[::2], torch.zeros(2, 5))
    assert not banded_host.is_possible(values.half(), values.half(), torch.zeros(2, 10))
    with pytest.raises(ValueError, match=r"no compiled step for torch\.float16"):
        HostRuns().add(
            values.half(), values.half(), torch.zeros(2, 10), start=0, chain_length=5, owned=(0, 10), beta1=0.9,
            decay=0.9, weight=0.1, scale=1.0, graft_eps=0.0, ridge=0.0, gamma=0.0,
        )  # fmt: skip


def test_without_a_compiler_it_says_so_once_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for path in ("", "/nonexistent"):
        banded_host.load.cache_clear()
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            if path:
                patch.setenv("PATH", path)
                patch.delenv("CXX", raising=False)
            parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 99).double().view(9, 11) * k) for k in (1, 2)]
            optimizer = SONew(parameters, lr=0.01, start_preconditioning_step=2)
            for step in range(6):
                for parameter in parameters:
                    parameter.grad = (parameter.detach() * 3 + step).sin()
                optimizer.step()
            results.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    banded_host.load.cache_clear()
    assert caplog.text.count("no C++ compiler") == 1
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_compiler_that_fails_is_quoted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    banded_host.load.cache_clear()
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert banded_host.load() is None
    banded_host.load.cache_clear()
    assert "false could not build" in caplog.text
