from __future__ import annotations

import numpy as np
import pytest

from lightning_soo.linalg import InverseRootError, inverse_root
from lightning_soo.linalg.inverse_roots import inverse_roots


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


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 3.0])
def test_along_a_diagonal_a_small_matrix_has_the_ridge_of_the_whole(eps: float) -> None:
    one, two, other = (matrix(condition)[0] for condition in (1e3, 1e2, 1e4))
    parts = one, 1e-9 * two, np.zeros_like(one)
    (*found, alone), _ = inverse_roots(
        (*parts, other), divisor=1.0, exponent=4.0, eps=eps, relative_eps=True, counts=[3, 1]
    )
    ridge = eps * np.linalg.eigvalsh(one)[-1]
    for part, root in zip(parts, found, strict=True):
        values, vectors = np.linalg.eigh(part + ridge * np.eye(len(part)))
        assert np.abs(root - (vectors * values**-0.25) @ vectors.T).max() < 1e-8 * np.abs(root).max()
    assert np.array_equal(alone, inverse_root(other, 4.0, eps=eps).root)


@pytest.mark.parametrize("other", [np.zeros((2, 2)), np.eye(2)])
def test_no_gradient_gives_roots_of_zero(other: np.ndarray) -> None:
    roots, diagnostics = inverse_roots(
        (np.zeros((3, 3)), other), divisor=0.1, exponent=4.0, eps=1e-6, relative_eps=True
    )
    assert not any(root.any() for root in roots) and [root.shape for root in roots] == [(3, 3), (2, 2)]
    assert diagnostics == {"condition_number": 0.0, "residual": 0.0}
