"""SONew's mathematics against golden and dense float64 values: solutions, edge removal, trajectories, cuts."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_soo.linalg import banded
from lightning_soo.preconditioners.banded import BandedStatistics, direction, round_stochastically
from lightning_soo.preconditioners.tridiagonal import tridiagonal_step

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "sonew.npz")
SOLUTIONS = [key[2:] for key in GOLDEN.files if key.startswith("S_")]


def bands_of(matrix: np.ndarray, bandwidth: int) -> Tensor:
    bands = torch.zeros(bandwidth + 1, len(matrix), dtype=torch.float64)
    for distance in range(bandwidth + 1):
        bands[distance, : len(matrix) - distance] = torch.from_numpy(np.diag(matrix, distance).copy())
    return bands


def dense(lower: Tensor, inverse_diagonal: Tensor) -> np.ndarray:
    n = inverse_diagonal.shape[0]
    left = np.eye(n)
    for distance in range(1, min(lower.shape[0], n - 1) + 1):
        left += np.diag(lower[distance - 1, : n - distance].double().numpy(), -distance)
    return left @ np.diag(1 / inverse_diagonal.double().numpy()) @ left.T


def random_bands(n: int, bandwidth: int, gradients: int, seed: int, chain_length: int | None = None) -> Tensor:
    """Statistics of gradients that are correlated between neighbours, float64."""
    generator = torch.Generator().manual_seed(seed)
    statistics = BandedStatistics.zeros(n, bandwidth, chain_length=chain_length or n, dtype=torch.float64)
    for _ in range(gradients):
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        statistics.observe(noise + 0.8 * noise.roll(1), decay=1.0, weight=1.0, magnitude=float(noise.abs().max()))
    return statistics.bands


def window_by_window(bands: Tensor, keep: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Each vertex's system solved on its own; ``keep[j]`` false cuts between j and j + 1."""
    bandwidth, n = bands.shape[0] - 1, bands.shape[1]
    matrix = np.zeros((n, n))
    for distance in range(bandwidth + 1):
        values = bands[distance, : n - distance].numpy()
        matrix += np.diag(values, distance) + (np.diag(values, -distance) if distance else ridge * np.eye(n))
    left, inverse_diagonal = np.eye(n), np.zeros(n)
    for j in range(n):
        window = []
        for i in range(j + 1, min(j + bandwidth, n - 1) + 1):
            if not keep[i - 1]:
                break
            window.append(i)
        solution = np.linalg.solve(matrix[np.ix_(window, window)], matrix[window, j])
        left[window, j] = -solution
        inverse_diagonal[j] = matrix[j, j] - matrix[window, j] @ solution
    return left, inverse_diagonal


@pytest.mark.parametrize("key", SOLUTIONS)
def test_logdet_solutions(key: str) -> None:
    bandwidth = int(key.split("_b")[1])
    lower, inverse_diagonal = banded.factor(bands_of(GOLDEN[f"S_{key}"], bandwidth), 0.0)
    expected = GOLDEN[f"X_{key}"]
    np.testing.assert_allclose(dense(lower, inverse_diagonal), expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    vector = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
    product = banded.apply(lower, inverse_diagonal, vector)
    np.testing.assert_allclose(product.numpy(), expected @ vector.numpy(), atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize(("key", "removed", "vertex"), [("n12_b1", "noedge4", 4), ("n12_b4", "drop5", 5)])
def test_removed_edges(key: str, removed: str, vertex: int) -> None:
    keep = torch.arange(12) != vertex
    bands = banded.cut_chains(bands_of(GOLDEN[f"S_{key}"], int(key[-1])), keep)
    expected = GOLDEN[f"X_{key}_{removed}"]
    np.testing.assert_allclose(dense(*banded.factor(bands, 0.0)), expected, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("key", ["n12_b1", "n12_b2", "n12_b4", "n24_b1"])
def test_threshold_removes_and_solves_again(key: str) -> None:
    """The vertices at or below the threshold, and no others, are cut off, wherever the threshold lies."""
    bandwidth = int(key.split("_b")[1])
    bands = bands_of(GOLDEN[f"S_{key}"], bandwidth)
    _, inverse_diagonal = banded.factor(bands, 0.0)
    ratios = inverse_diagonal / bands[0]
    for gamma in [*((ratios[:-1] * 1.0001).tolist()), 0.5, 1.5]:
        cut = banded.factor(bands, 0.0, gamma)
        left, expected = window_by_window(bands, (ratios > gamma).numpy(), 0.0)
        np.testing.assert_allclose(cut[1].numpy(), expected, rtol=1e-9)
        np.testing.assert_allclose(dense(*cut), left @ np.diag(1 / expected) @ left.T, atol=1e-8 / expected.min())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 14),
    bandwidth=st.integers(0, 6),
    seed=st.integers(0, 1000),
    ridge=st.sampled_from([0.0, 1e-3, 1.0]),
)
def test_optimality(n: int, bandwidth: int, seed: int, ridge: float) -> None:
    """KKT: X has the band's sparsity, is positive definite, and its inverse agrees with S + ridge I on the band."""
    bands = random_bands(n, bandwidth, 20, seed)
    factored = banded.factor(bands, ridge)
    solution = dense(*factored)
    assert np.linalg.eigvalsh(solution).min() > 0
    inverse = np.linalg.inv(solution)
    for distance in range(n):
        if distance > bandwidth:
            assert np.abs(np.diag(solution, distance)).max(initial=0) == 0
            continue
        target = bands[distance, : n - distance].numpy() + (ridge if distance == 0 else 0.0)
        np.testing.assert_allclose(np.diag(inverse, distance), target, atol=1e-8 * float(bands[0].max() + ridge))


@pytest.mark.parametrize("bandwidth", [1, 4])
def test_golden_trajectory(bandwidth: int) -> None:
    name = f"traj_b{bandwidth}_"
    parameter = torch.from_numpy(GOLDEN[name + "p0"].copy())
    statistics = BandedStatistics.zeros(35, bandwidth, chain_length=35, dtype=torch.float64)
    first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for step, values in enumerate(GOLDEN[name + "grads"], start=1):
        gradient = torch.from_numpy(values.copy())
        first.lerp_(gradient, 0.1)
        second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        statistics.observe(gradient, decay=0.99, weight=0.01, magnitude=float(gradient.abs().max()))
        correction = 1 - 0.99**step
        vector = first / (1 - 0.9**step)
        update = direction(statistics.bands, vector, ridge=statistics.ridge(1e-8, correction=correction), gamma=1e-12)
        graft = vector / ((second / correction).sqrt() + 1e-8)
        parameter.sub_(update * graft.norm() / update.norm(), alpha=1e-2)
        np.testing.assert_allclose(parameter.numpy(), GOLDEN[name + "params"][step - 1], atol=1e-8)
    np.testing.assert_allclose(statistics.bands[0].numpy(), GOLDEN[name + "diag"], atol=1e-12)
    for distance in range(1, bandwidth + 1):
        expected = GOLDEN[name + "off"][:, distance - 1]
        np.testing.assert_allclose(statistics.bands[distance].numpy()[: 35 - distance], expected[: 35 - distance])


@pytest.mark.parametrize("chain_length", [9, 100, 70_000])
@pytest.mark.parametrize("bandwidth", [0, 1, 2, 4])
@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_cut_runs_equal_the_uncut_chain(bandwidth: int, gamma: float, chain_length: int) -> None:
    """Pieces with a halo, also of a run longer than a chunk, give the bits of the uncut run."""
    total = chain_length if chain_length > 20_000 else 900
    generator = torch.Generator().manual_seed(bandwidth)
    gradients = [torch.randn(total, generator=generator) for _ in range(6)]
    gradients = [gradient + 0.8 * gradient.roll(1) for gradient in gradients]
    left, right = banded.halo(bandwidth) if gamma else (bandwidth, bandwidth)

    def run(begin: int, end: int) -> tuple[BandedStatistics, Tensor]:
        statistics = BandedStatistics.zeros(end - begin, bandwidth, start=begin, chain_length=chain_length)
        for gradient in gradients:
            statistics.observe(gradient[begin:end], decay=0.9, weight=0.1, magnitude=5.0)
        return statistics, direction(statistics.bands, gradients[-1][begin:end], ridge=1e-3, gamma=gamma)

    whole_statistics, whole = run(0, total)
    peaks = banded.chain_peaks(whole_statistics.bands, 0, chain_length)
    expanded = banded.expand_chains(peaks, total, 0, chain_length)
    cuts = [0, 1, 4, 5, 17, 333, 340, 341, 555, total - 1, total]
    for first, last in pairwise(cuts):
        begin, end = max(first - left, 0), min(last + right, total)
        statistics, piece = run(begin, end)
        assert torch.equal(piece[first - begin : last - begin], whole[first:last])
        first_chain = begin // chain_length
        part = banded.expand_chains(
            peaks[first_chain : (end - 1) // chain_length + 1], end - begin, begin, chain_length
        )
        assert torch.equal(part, expanded[begin:end])
        chains = banded.chain_peaks(statistics.bands, begin, chain_length)
        assert chains.shape[0] == (end - 1) // chain_length - first_chain + 1
        assert bool((chains <= peaks[first_chain:][: len(chains)]).all())


@pytest.mark.parametrize("chain_length", [1, 2, 3, 8])
@pytest.mark.parametrize("bandwidth", [1, 4])
def test_rows_are_never_coupled(bandwidth: int, chain_length: int) -> None:
    """A run of rows, begun inside one, is its rows one by one, each with its own ridge."""
    start, n = 5, 43
    statistics = BandedStatistics.zeros(n, bandwidth, start=start, chain_length=chain_length, dtype=torch.float64)
    gradients = torch.randn(7, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for gradient in gradients:
        statistics.observe(gradient, decay=0.9, weight=0.1, magnitude=4.0)
    result = direction(statistics.bands, gradients[0], ridge=statistics.relative_ridge(1e-4), gamma=1e-3)
    edges = sorted({0, n, *(j for j in range(n) if (start + j) % chain_length == 0)})
    for first, last in pairwise(edges):
        row = BandedStatistics.zeros(last - first, bandwidth, chain_length=last - first, dtype=torch.float64)
        for gradient in gradients:
            row.observe(gradient[first:last], decay=0.9, weight=0.1, magnitude=4.0)
        ridge = 1e-4 * float(row.bands[0].max())
        expected = direction(row.bands, gradients[0][first:last], ridge=ridge, gamma=1e-3)
        torch.testing.assert_close(result[first:last], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [0, 1, 3])
def test_zero_gradients(bandwidth: int) -> None:
    statistics = BandedStatistics.zeros(50, bandwidth, chain_length=10)
    zero = torch.zeros(50)
    statistics.observe(zero, decay=0.99, weight=0.01, magnitude=0.0)
    for ridge in (0.0, statistics.relative_ridge(1e-6)):
        assert torch.equal(direction(statistics.bands, zero, ridge=ridge, gamma=1e-6), zero)
    gradient = zero.clone()
    gradient[:10] = torch.linspace(-1, 1, 10)  # the other chains have still seen nothing
    statistics.observe(gradient, decay=0.99, weight=0.01, magnitude=1.0)
    for ridge in (0.0, statistics.relative_ridge(1e-6)):
        result = direction(statistics.bands, gradient, ridge=ridge, gamma=1e-6)
        assert bool(result.isfinite().all()) and not bool(result[10:].any()) and bool(result[:10].any())


@pytest.mark.parametrize("factor", [1e20, 1e-20])
@pytest.mark.parametrize("bandwidth", [0, 1, 3])
def test_extreme_gradients(bandwidth: int, factor: float) -> None:
    """The direction X m of gradients times c is that of the gradients divided by c; with normal ones in between."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(60, generator=generator) for _ in range(8)]
    power = 2.0 ** round(np.log2(factor))  # exact in float32, so only the rescaling could make a difference
    results = []
    for scale in (1.0, power):
        statistics = BandedStatistics.zeros(60, bandwidth, chain_length=20)
        for gradient in gradients:
            magnitude = float(gradient.abs().max()) * scale
            statistics.observe(gradient * scale, decay=0.9, weight=0.1, magnitude=magnitude)
        result = direction(
            statistics.bands, gradients[-1] * scale, ridge=statistics.relative_ridge(1e-4), gamma=1e-4
        ).double()
        assert bool(result.isfinite().all())
        results.append(result * statistics.scale**2 * scale)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0.0)


def test_scale_changes_midway_and_is_saved() -> None:
    generator = torch.Generator().manual_seed(0)
    statistics = BandedStatistics.zeros(30, 2, chain_length=30)
    for factor in (1.0, 1e-20, 1e20, 1e20):
        gradient = torch.randn(30, generator=generator) * factor
        statistics.observe(gradient, decay=0.9, weight=0.1, magnitude=float(gradient.abs().max()))
    assert bool(statistics.bands.isfinite().all()) and statistics.scale < 1e-15
    other = BandedStatistics.zeros(30, 2, chain_length=30)
    other.load_state_dict(statistics.state_dict())
    for each in (statistics, other):
        each.observe(gradient, decay=0.9, weight=0.1, magnitude=3e20)
    assert torch.equal(statistics.bands, other.bands) and statistics.scale == other.scale


def test_bfloat16_gradients() -> None:
    gradients = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    low, high = (BandedStatistics.zeros(40, 1, chain_length=8) for _ in range(2))
    for gradient in gradients:
        low.observe(gradient, decay=0.9, weight=0.1, magnitude=4.0)
        high.observe(gradient.float(), decay=0.9, weight=0.1, magnitude=4.0)
    assert torch.equal(low.bands, high.bands)
    result = direction(low.bands, gradients[0], ridge=1e-4, gamma=1e-6)
    assert result.dtype == torch.float32 and bool(result.isfinite().all())


def test_bfloat16_statistics() -> None:
    """Unbiased after many steps, where plain rounding stands still; the same bits in a part of the run."""
    n, steps = 2000, 500
    mean = torch.linspace(0.5, 2, n)
    whole = BandedStatistics.zeros(n, 1, chain_length=n, dtype=torch.bfloat16, seed=7)
    part = BandedStatistics.zeros(100, 1, chain_length=n, start=301, dtype=torch.bfloat16, seed=7)
    exact, plain = BandedStatistics.zeros(n, 1, chain_length=n), torch.zeros(n, dtype=torch.bfloat16)
    for _ in range(steps):
        for statistics, gradient in ((whole, mean), (part, mean[301:401]), (exact, mean)):
            statistics.observe(gradient, decay=0.999, weight=0.001, magnitude=2.0)
        plain = (plain.float() * 0.999 + 0.001 * mean**2).bfloat16()
    assert torch.equal(whole.bands[0, 301:401], part.bands[0])
    assert torch.equal(whole.bands[1, 301:400], part.bands[1, :99])
    errors = whole.bands[0].float() / exact.bands[0] - 1
    assert abs(float(errors.mean())) < 2e-3 and float(errors.abs().max()) < 0.25
    assert abs(float((plain.float() / exact.bands[0] - 1).mean())) > 0.05


def test_stochastic_rounding() -> None:
    value = torch.full((100_000,), 1.0 + 0.3 * 2**-7)  # bfloat16 has 7 bits behind the point
    rounded = round_stochastically(value, 0, 5)
    assert set(rounded.float().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(float(rounded.double().mean()) - 1 - 0.3 * 2**-7) < 0.01 * 2**-7
    assert not torch.equal(rounded, round_stochastically(value, 0, 6))
    assert torch.equal(rounded[10:], round_stochastically(value[10:], 10, 5))
    assert torch.equal(round_stochastically(-value, 0, 5), -rounded)
    exact = torch.tensor([0.0, 1.0, -2.5])
    assert torch.equal(round_stochastically(exact, 0, 1).float(), exact)


COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILER)])
@pytest.mark.parametrize("chain_length", [1, 7, 64, 100_000])
def test_one_sweep_gives_what_the_parts_give(chain_length: int, compiled: bool) -> None:
    """The tridiagonal step in small chunks, owned in part, against statistics, momentum and direction on their own."""
    n, start, owned = 1000, 5, (1, 997)
    generator = torch.Generator().manual_seed(2)
    parts = BandedStatistics.zeros(n, 1, start=start, chain_length=chain_length, dtype=torch.float64)
    sweep = BandedStatistics.zeros(n, 1, start=start, chain_length=chain_length, dtype=torch.float64)
    momentum, filtered, out = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    for step, factor in enumerate((1.0, 1.0, 1e-20, 1.0, 1.0), start=1):
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        gradient, magnitude = (noise + 0.8 * noise.roll(1)) * factor, 5.0 * factor
        correction = 1 - 0.9**step
        parts.observe(gradient, decay=0.9, weight=0.1, magnitude=magnitude)
        momentum.lerp_(gradient, 0.1)
        ridge = parts.ridge(1e-6, correction=correction)
        expected = direction(parts.bands, momentum, ridge=ridge, gamma=0.3)
        norms = tridiagonal_step(
            sweep, gradient, filtered, beta1=0.9, decay=0.9, weight=0.1, magnitude=magnitude, correction=correction,
            eps=1e-8, ridge=ridge if step != 4 else torch.full((n,), float(ridge), dtype=torch.float64), gamma=0.3,
            out=out, owned=owned, chunk=64, compiled=compiled,
        )  # fmt: skip
        torch.testing.assert_close(sweep.bands, parts.bands, rtol=1e-12, atol=0)
        torch.testing.assert_close(filtered, momentum, rtol=1e-12, atol=1e-30)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        graft = momentum / ((parts.bands[0] / correction).sqrt() / parts.scale + 1e-8)
        for value, array in zip(norms, (expected, graft), strict=True):
            torch.testing.assert_close(value, array[slice(*owned)].square().sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 64, 65, 66, 129])
def test_one_sweep_of_few_elements(n: int) -> None:
    parts, sweep = (BandedStatistics.zeros(n, 1, chain_length=n, dtype=torch.float64) for _ in range(2))
    gradient = torch.linspace(-1, 2, n, dtype=torch.float64)
    momentum, out = torch.zeros_like(gradient), torch.zeros_like(gradient)
    parts.observe(gradient, decay=0.9, weight=0.1, magnitude=2.0)
    tridiagonal_step(
        sweep, gradient, momentum, beta1=0.9, decay=0.9, weight=0.1, magnitude=2.0, correction=0.1, eps=1e-8,
        ridge=1e-3, gamma=0.0, out=out, chunk=64,
    )  # fmt: skip
    torch.testing.assert_close(sweep.bands, parts.bands)
    torch.testing.assert_close(out, direction(parts.bands, gradient * 0.1, ridge=1e-3, gamma=0.0))
