"""The compiled step on the host against the separate functions of banded statistics, which test_banded.py checks."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from lightning_soo import SONew
from lightning_soo.linalg import banded
from lightning_soo.preconditioners import banded_host
from lightning_soo.preconditioners.banded import BandedStatistics, direction
from lightning_soo.preconditioners.banded_host import HostRuns

pytestmark = pytest.mark.skipif(banded_host.load() is None, reason="no C++ compiler")
DECAY, WEIGHT, BETA1, EPS = 0.9, 0.1, 0.8, 1e-8


def run_both(
    n: int,
    bandwidth: int,
    chain_length: int,
    start: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    outer: torch.dtype | None = None,
    gamma: float = 1e-3,
    magnitude: float = 1.0,
    steps: int = 8,
    per_chain: bool = False,
    owned: tuple[int, int] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Bands, momentum, direction and squares after some steps: compiled, and by the separate functions."""
    outer = outer or dtype
    make = torch.Generator().manual_seed(n + bandwidth)
    expected, found = (
        BandedStatistics.zeros(n, bandwidth, chain_length=chain_length, start=start, dtype=dtype) for _ in range(2)
    )
    moment, moment_found = torch.zeros(n, dtype=outer), torch.zeros(n, dtype=outer)
    first, last = owned or (0, n)
    total = 0.0
    for _ in range(steps):
        noise = torch.randn(n, generator=make, dtype=torch.float64)
        gradient = ((noise + 0.9 * noise.roll(1)) * magnitude).to(outer)
        largest = float(gradient.double().abs().max()) if n else 0.0
        total = total * DECAY + WEIGHT
        for statistics in (expected, found):
            statistics.rescale(decay=DECAY, magnitude=largest)
        peaks = banded.chain_peaks(expected.bands, start, chain_length) * 1e-4
        ridge = banded.expand_chains(peaks, n, start, chain_length)
        expected.observe(gradient, decay=DECAY, weight=WEIGHT, magnitude=largest)
        moment.lerp_(gradient, 1.0 - BETA1)
        moved = direction(expected.bands, moment, ridge=ridge, gamma=gamma)
        graft = moment.double() / ((expected.bands[0].double() / total).sqrt() / expected.scale + EPS)
        unit = found.scale * total**0.5
        runs, out = HostRuns(), gradient.clone()
        runs.add(
            out,
            moment_found,
            found.bands,
            start=start,
            chain_length=chain_length,
            owned=(first, last),
            beta1=BETA1,
            decay=DECAY,
            weight=WEIGHT,
            scale=found.scale,
            graft_eps=unit * EPS,
            ridge=peaks if per_chain else 1e-4,
            gamma=gamma,
        )
        ((square, graft_square),) = runs.carry_out()
    squares = [moved[first:last].double().square().sum(), graft[first:last].square().sum()]
    return {
        "bands": (found.bands, expected.bands),
        "momentum": (moment_found, moment),
        "direction": (out, moved),
        "squares": (torch.tensor([square, graft_square * unit**2], dtype=torch.float64), torch.stack(squares)),
    }


def assert_equal(both: dict[str, tuple[Tensor, Tensor]], tolerance: float) -> None:
    for name, (found, expected) in both.items():
        size = float(expected.double().abs().max()) if expected.numel() else 0.0
        worst = float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0
        assert worst <= tolerance * size, f"{name}: {worst:.2e} of {size:.2e}"


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
    """At a threshold that cuts most chains somewhere; the share is looked at, or nothing would be tested."""
    both = run_both(3000, bandwidth, 300, gamma=0.55)
    assert_equal(both, 1e-10)
    expected = both["bands"][1]
    _, inverse = banded.factor(expected, 0.0, 0.0)
    removed = float((inverse <= 0.55 * expected[0]).double().mean())
    assert 0.02 < removed < 0.98


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
