from __future__ import annotations

import numpy as np
import pytest

from lightning_soo.linalg import InverseRootError, inverse_root


def matrix(condition: float, order: int = 40, repeated: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    vectors = np.linalg.qr(rng.standard_normal((order, order)))[0]
    values = np.logspace(0, -np.log10(condition), order)
    if repeated:
        values[: order // 2] = values[0]
    return (vectors * values) @ vectors.T, vectors, values


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("exponent", [2, 4, 6])
@pytest.mark.parametrize("solver", ["eigh", "newton"])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e10, 1e12])
def test_root_of_known_spectrum(condition: float, solver: str, exponent: int, repeated: bool) -> None:
    a, vectors, values = matrix(condition, repeated=repeated)
    ridge = 1e-13  # absolute, and part of the expected spectrum
    found = inverse_root(a, exponent, eps=ridge, relative_eps=False, solver=solver)
    expected = (vectors * (values + ridge) ** (-1.0 / exponent)) @ vectors.T
    # rounding of the input moves an eigenvalue by 1e-16 of the largest, so the root by about condition * 1e-16
    tolerance = max(1e-11, 100 * condition * np.finfo(float).eps)
    assert np.abs(found.root - expected).max() <= tolerance * np.abs(expected).max()
    assert found.condition_number == pytest.approx(values.max() / values.min(), rel=0.2)


def test_rank_deficient_with_relative_ridge() -> None:
    factor = np.random.default_rng(1).standard_normal((30, 5))
    a = factor @ factor.T
    found = inverse_root(a, 4, eps=1e-6)
    damped = a + 1e-6 * np.linalg.eigvalsh(a)[-1] * np.eye(30)
    assert np.abs(np.linalg.matrix_power(found.root, 4) @ damped - np.eye(30)).max() < 1e-6


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_extreme_scales(size: float) -> None:
    a, vectors, values = matrix(1e3)
    found = inverse_root(a * size, 4, eps=0.0)
    expected = (vectors * (values * size) ** -0.25) @ vectors.T
    assert np.abs(found.root - expected).max() <= 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.diag([1.0, 0.0, 0.0])])
def test_what_has_no_root_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(InverseRootError):
        inverse_root(bad, 4, eps=0.0)


def test_fractional_exponent() -> None:
    a, vectors, values = matrix(1e3)
    expected = (vectors * values ** (-1 / 1.5)) @ vectors.T
    assert np.abs(inverse_root(a, 1.5, eps=0.0).root - expected).max() < 1e-9 * np.abs(expected).max()
