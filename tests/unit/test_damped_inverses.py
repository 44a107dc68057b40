"""Inverses of damped Kronecker products against golden values and against the dense matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lightning_soo.linalg.damped_inverses import (
    FactorError,
    eigen_decompositions,
    factored_inverses,
    shares_of_damping,
)

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "kfac_mlp.npz")


def exact(inputs: np.ndarray, gradients: np.ndarray, value: np.ndarray, damping: float) -> np.ndarray:
    (a, g, a_values, g_values), _ = eigen_decompositions((inputs, gradients))
    return g @ ((g.T @ value @ a) / (np.outer(g_values, a_values) + damping)) @ a.T


@pytest.mark.parametrize("layer", ["0", "2", "4"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type2", "emp", "mc"])
def test_golden_directions(fisher: str, approximation: str, layer: str) -> None:
    factors = [GOLDEN[f"curvlinops/{fisher}/{approximation}/{layer}/{name}"] for name in ("A_joint", "G")]
    value = np.concatenate([GOLDEN[f"grad/{layer}.weight"], GOLDEN[f"grad/{layer}.bias"][:, None]], 1)
    damping = float(GOLDEN["lam"])
    expected = GOLDEN[f"precond_exact/{fisher}/{approximation}/{layer}"]
    np.testing.assert_allclose(exact(*factors, value, damping), expected, rtol=1e-8, atol=1e-10)
    (inputs, gradients), diagnostics = factored_inverses(factors, damping=damping)
    expected = GOLDEN[f"precond_pi/{fisher}/{approximation}/{layer}"]
    np.testing.assert_allclose(gradients @ value @ inputs, expected, rtol=1e-8, atol=1e-10)
    assert diagnostics["residual"] < 1e-10 and diagnostics["condition_number"] >= 1.0


def test_exact_is_the_dense_inverse() -> None:
    generator = np.random.default_rng(0)
    roots = generator.standard_normal((4, 4)), generator.standard_normal((3, 3))
    inputs, gradients = (root @ root.T for root in roots)
    value = generator.standard_normal((3, 4))
    dense = np.kron(gradients, inputs) + 0.3 * np.eye(12)
    expected = np.linalg.solve(dense, value.reshape(-1)).reshape(3, 4)
    np.testing.assert_allclose(exact(inputs, gradients, value, 0.3), expected, rtol=1e-12)


def test_factors_without_a_trace() -> None:
    zero, some = np.zeros((3, 3)), np.eye(2) * 4
    assert shares_of_damping((zero, some), 0.25) == shares_of_damping((some, zero), 0.25) == [0.5, 0.5]
    (inputs, gradients), _ = factored_inverses((zero, some), damping=0.25)
    np.testing.assert_allclose(inputs, np.eye(3) / 0.5)
    np.testing.assert_allclose(gradients, np.eye(2) / 4.5)
    _, diagnostics = eigen_decompositions((zero, some))
    assert diagnostics["condition_number"] == np.inf


def test_bad_factors_are_refused() -> None:
    bad = np.array([[1.0, np.nan], [np.nan, 1.0]])
    with pytest.raises(FactorError, match="not finite"):
        eigen_decompositions((bad, np.eye(2)))
    with pytest.raises(FactorError, match="not finite"):
        factored_inverses((np.eye(2), bad), damping=1.0)
    with pytest.raises(FactorError, match=r"not positive definite with damping 0\.01"):
        factored_inverses((-np.eye(2), np.eye(2)), damping=0.01)
