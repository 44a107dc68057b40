"""Steihaug's conjugate gradients against scipy's and against dense minimisers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_soo.linalg.trust_region import boundary_crossings, gram_matrix, steihaug

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "trust_region.npz")


def problem(seed: int, *, size: int = 30, negative: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(-2, 1, size, dtype=torch.float64)
    values[:negative] *= -1
    gradient = torch.randn(size, generator=generator, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, gradient


@pytest.mark.parametrize("case", ["interior", "boundary", "negcurv"])
def test_solutions_of_scipy(case: str) -> None:
    hessian, gradient = (torch.from_numpy(GOLDEN[f"sub/{case}/{name}"]) for name in ("H", "g"))
    norm = float(gradient.norm())
    solution, *_ = steihaug(
        lambda v: hessian @ v,
        gradient,
        float(GOLDEN[f"sub/{case}/radius"]),
        tolerance=min(0.5, norm**0.5) * norm,
        max_iterations=100,
    )
    assert torch.allclose(solution.step, torch.from_numpy(GOLDEN[f"sub/{case}/p"]), rtol=0, atol=1e-12)
    assert solution.on_boundary == bool(GOLDEN[f"sub/{case}/hits_boundary"])
    assert solution.model == pytest.approx(float(GOLDEN[f"sub/{case}/model"]), abs=1e-12)
    assert solution.norm == pytest.approx(float(solution.step.norm()), rel=1e-12)


def test_negative_curvature_is_followed_to_the_boundary() -> None:
    hessian, gradient = (torch.from_numpy(GOLDEN[f"sub/negcurv/{name}"]) for name in ("H", "g"))
    assert torch.linalg.eigvalsh(hessian)[0] < 0
    solution, *_ = steihaug(lambda v: hessian @ v, gradient, 1e3, tolerance=1e-9, max_iterations=100)
    assert solution.negative_curvature and solution.on_boundary
    assert float(solution.step.norm()) == pytest.approx(1e3)


def test_newton_step_where_the_region_is_large() -> None:
    hessian, gradient = problem(0)
    solution, *_ = steihaug(lambda v: hessian @ v, gradient, 1e6, tolerance=1e-12, max_iterations=200)
    assert torch.allclose(solution.step, -torch.linalg.solve(hessian, gradient), rtol=1e-9)
    assert not solution.on_boundary


@pytest.mark.parametrize("negative", [0, 3])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_smaller_radii_are_solved_on_the_way(negative: int, preconditioned: bool) -> None:
    """The solution that is stored for a smaller radius is the one that an iteration inside it finds."""
    hessian, gradient = problem(1, negative=negative)
    diagonal = torch.linspace(0.5, 3.0, len(gradient), dtype=torch.float64)
    options = {
        "tolerance": 1e-8,
        "max_iterations": 60,
        "precondition": (lambda r: r / diagonal) if preconditioned else None,
    }
    radii = [8.0 / 2**power for power in range(1, 8)]
    few = steihaug(lambda v: hessian @ v, gradient, 8.0, smaller_radii=radii, stored=2, **options)
    assert [round(one.radius, 9) for one in few] == [8.0, *radii[:2]]
    solutions = steihaug(lambda v: hessian @ v, gradient, 8.0, smaller_radii=radii, stored=9, **options)
    assert [round(one.radius, 9) for one in solutions] == [8.0, *radii]
    for stored in solutions[1:]:
        alone, *_ = steihaug(lambda v: hessian @ v, gradient, stored.radius, **options)
        assert torch.allclose(stored.step, alone.step, rtol=0, atol=1e-9)
        assert stored.model == pytest.approx(alone.model, abs=1e-10)
        weights = diagonal if preconditioned else torch.ones_like(diagonal)
        assert float((stored.step * weights * stored.step).sum()) ** 0.5 == pytest.approx(stored.radius, rel=1e-9)
        quadratic = float(gradient @ stored.step + stored.step @ hessian @ stored.step / 2)
        assert stored.model == pytest.approx(quadratic, abs=1e-9)


def test_a_preconditioner_is_a_change_of_variables() -> None:
    """CG with M is CG without one in y = M^(1/2) s."""
    hessian, gradient = problem(2, negative=2)
    diagonal = torch.linspace(0.2, 5.0, len(gradient), dtype=torch.float64)
    root = diagonal.sqrt()
    changed = hessian / root[:, None] / root
    for radius in (0.5, 3.0, 50.0):
        ours, *_ = steihaug(
            lambda v: hessian @ v,
            gradient,
            radius,
            tolerance=0.0,
            max_iterations=9,
            precondition=lambda r: r / diagonal,
        )
        plain, *_ = steihaug(lambda v: changed @ v, gradient / root, radius, tolerance=0.0, max_iterations=9)
        assert torch.allclose(ours.step, plain.step / root, rtol=0, atol=1e-9)
        assert ours.iterations == plain.iterations and ours.on_boundary == plain.on_boundary


def test_one_reduction_for_each_iteration() -> None:
    hessian, gradient = problem(3)
    calls = 0

    def gram(vectors):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return gram_matrix(vectors)

    solution, *_ = steihaug(lambda v: hessian @ v, gradient, 1e6, tolerance=1e-3, max_iterations=50, gram=gram)
    assert calls == solution.iterations > 5


def test_a_product_that_is_not_finite_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="product 1 with the curvature is not finite"):
        steihaug(lambda v: v * float("nan"), torch.ones(3), 1.0, tolerance=0.1, max_iterations=5)


def test_inner_products_in_pieces() -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = [torch.randn(200_003, generator=generator) for _ in range(3)]
    exact = torch.stack(vectors).double()
    assert torch.allclose(gram_matrix(vectors), exact @ exact.T, rtol=1e-13)


@pytest.mark.parametrize("along", [0.0, 0.3, -0.3, 1e-9])
def test_crossings_lie_on_the_boundary(along: float) -> None:
    for t in boundary_crossings(0.25, along, 2.0, 1.0):
        assert 0.25 + 2 * t * along + t * t * 2.0 == pytest.approx(1.0, abs=1e-12)
