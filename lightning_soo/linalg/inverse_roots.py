"""Inverse p-th roots of symmetric positive semi-definite matrices, in float64 numpy.

numpy only, on purpose: the same functions run in the trainer's process, in a background thread and in worker
processes that never import torch, and give the same bits in each as long as BLAS runs one thread.

Two solvers. ``eigh`` is the default: on a CPU one float64 ``eigh`` costs four to seven matrix products, any
iteration costs dozens. ``newton`` (coupled Newton, Iannazzo 2006; Anil et al. 2020, algorithm II) needs nothing but
products; it takes over where LAPACK's ``eigh`` does not converge.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


class InverseRootError(ArithmeticError):
    """No solver gave a root that verifies. The message holds the order, the condition number and the residual.

    Attributes:
        diagnostics: ``condition_number`` and ``residual`` of the last attempt, where there was one.
    """

    def __init__(self, message: str, **diagnostics: float) -> None:
        super().__init__(message)
        self.diagnostics = diagnostics


@dataclass(frozen=True, kw_only=True)
class InverseRoot:
    """One inverse root and how far it can be trusted.

    Attributes:
        root: ``(A + ridge I)^(-1/p)``, ``(n, n)`` float64, symmetric.
        condition_number: largest over smallest eigenvalue of ``A + ridge I``.
        residual: ``||X^p (A + ridge I) v - v|| / ||v||`` for one fixed probe vector ``v``.
        ridge: what was added to the diagonal (absolute).
        solver: ``"eigh"`` or ``"newton"``.
    """

    root: Matrix
    condition_number: float
    residual: float
    ridge: float
    solver: str


def inverse_root(
    matrix: npt.NDArray[np.floating],
    exponent: float,
    *,
    eps: float,
    relative_eps: bool = True,
    solver: str = "eigh",
    max_residual: float = 1e-2,
) -> InverseRoot:
    """Return a verified ``(A + ridge I)^(-1/p)`` with ``ridge = eps * lambda_max(A)``, or ``eps`` if not relative.

    Args:
        matrix: ``(n, n)`` symmetric; eigenvalues that rounding left below zero count as zero.
        exponent: ``p``; any positive number for ``eigh``, a whole number for ``newton``.
        eps: the ridge, a factor of the largest eigenvalue or (``relative_eps=False``) in the matrix's own units.
        solver: ``"eigh"`` falls back to ``"newton"`` where LAPACK does not converge.
        max_residual: a root whose probe residual is above this is not returned.

    Raises:
        InverseRootError: the matrix is zero (but for an absolute ridge) or not finite, or no solver gave a root that
            verifies.
        ValueError: unknown solver, or an exponent the solver cannot take.
    """
    if solver not in ("eigh", "newton"):
        raise ValueError(f"solver={solver!r}: choose 'eigh' or 'newton'")
    if not exponent > 0:
        raise ValueError(f"exponent={exponent}: the root A^(-1/p) needs p > 0")
    given = np.asarray(matrix, dtype=np.float64)
    order = given.shape[0]
    if not math.isfinite(largest_magnitude(given)):
        raise InverseRootError(f"matrix of order {order} holds NaN or Inf")
    a = given + given.T  # in place from here on: fresh memory costs its first touch
    a *= 0.5
    # LAPACK and the probe work on a matrix of size one, so that gradients of 1e+20 or 1e-20 are no special case.
    size = largest_magnitude(a)
    if not relative_eps:
        size = max(size, eps)
    if size == 0.0:
        raise InverseRootError(f"matrix of order {order} is zero: there is nothing to take the root of")
    a /= size
    relative = eps if relative_eps else eps / size
    failure, diagnostics = "", {}
    for name in ("eigh", "newton") if solver == "eigh" else ("newton",):
        if name == "newton" and exponent != int(exponent):
            failure += f"; newton needs a whole exponent, not {exponent}"
            continue
        try:
            found = (_root_eigh if name == "eigh" else _root_newton)(a, exponent, relative, relative_eps)
        except np.linalg.LinAlgError as error:
            failure += f"; {name}: {error}"
            continue
        if np.isfinite(found.root).all() and found.residual <= max_residual:
            np.multiply(found.root, size ** (-1.0 / exponent), out=found.root)
            return InverseRoot(
                root=found.root,
                condition_number=found.condition_number,
                residual=found.residual,
                ridge=found.ridge * size,
                solver=name,
            )
        diagnostics = {"condition_number": found.condition_number, "residual": found.residual}
        failure += f"; {name}: condition number {found.condition_number:.2e}, residual {found.residual:.2e}"
    raise InverseRootError(
        f"no inverse root of order {order} (exponent -1/{exponent:g}, eps {eps:g}) verified{failure}", **diagnostics
    )


def largest_magnitude(array: npt.NDArray[np.floating]) -> float:
    """Of any array; NaN where it holds one, 0 where it is empty."""
    return float(max(array.max(initial=0.0), -array.min(initial=0.0)))


def _root_eigh(a: Matrix, exponent: float, eps: float, relative_eps: bool) -> InverseRoot:
    eigenvalues, vectors = np.linalg.eigh(a)
    largest = float(eigenvalues[-1])
    ridge = eps * largest if relative_eps else eps
    clipped = np.maximum(eigenvalues, 0.0) + ridge
    if not clipped[0] > 0.0:
        raise np.linalg.LinAlgError(
            f"singular: smallest eigenvalue {eigenvalues[0]:.2e} with ridge {ridge:.2e}; raise preconditioner_eps"
        )
    half = vectors * clipped ** (-0.5 / exponent)
    root = half @ half.T  # numpy sees a matrix times its own transpose: half the flops, and exactly symmetric
    negative = int(np.searchsorted(eigenvalues, 0.0))
    probe = _probe(a.shape[0])
    target = a @ probe + ridge * probe
    if negative:  # what the root was taken of: the negative part is clipped away
        below = vectors[:, :negative]
        target -= below @ (eigenvalues[:negative] * (below.T @ probe))
    return InverseRoot(
        root=root,
        condition_number=float(clipped[-1] / clipped[0]),
        residual=_residual(root, exponent, target, probe, clipped, vectors),
        ridge=ridge,
        solver="eigh",
    )


def _root_newton(a: Matrix, exponent: float, eps: float, relative_eps: bool) -> InverseRoot:
    """Coupled Newton from the identity. A warm start from an older root is wrong: the two do not commute."""
    p, order = int(exponent), a.shape[0]
    largest = _largest_eigenvalue(a)
    ridge = eps * largest if relative_eps else eps
    damped = a + ridge * np.eye(order)
    scale = (1.0 + p) / (2.0 * np.linalg.norm(damped))
    coupled, root = scale * damped, np.eye(order) * scale ** (1.0 / p)
    best = np.inf
    for _ in range(200):
        error = float(np.abs(coupled - np.eye(order)).max())
        if not np.isfinite(error) or (error < 1e-6 and error >= best):
            break
        best = min(best, error)
        if error < 1e-14:
            break
        factor = ((p + 1.0) * np.eye(order) - coupled) / p
        root = root @ factor
        coupled = np.linalg.matrix_power(factor, p) @ coupled
    root = (root + root.T) * 0.5
    probe = _probe(order)
    smallest = 1.0 / _largest_eigenvalue(np.linalg.matrix_power(root, p))
    return InverseRoot(
        root=root,
        condition_number=(largest + ridge) / smallest,
        residual=_residual(root, exponent, damped @ probe, probe, None, None),
        ridge=ridge,
        solver="newton",
    )


def _probe(order: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(order).standard_normal(order)


def _residual(
    root: Matrix,
    exponent: float,
    target: npt.NDArray[np.float64],
    probe: npt.NDArray[np.float64],
    eigenvalues: npt.NDArray[np.float64] | None,
    vectors: Matrix | None,
) -> float:
    """How far ``X^p A`` is from the identity on the probe.

    The iteration's own error (``|M - I|`` of coupled Newton) can read 1e-14 while the root is wrong; this cannot.
    A fractional exponent has no such product: there the decomposition itself is checked on the probe.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if exponent == int(exponent) and exponent <= 64:
            image = target
            for _ in range(int(exponent)):
                image = root @ image
            return float(np.linalg.norm(image - probe) / np.linalg.norm(probe))
        assert eigenvalues is not None and vectors is not None
        rebuilt = vectors @ (eigenvalues * (vectors.T @ probe))
        return float(np.linalg.norm(rebuilt - target) / np.linalg.norm(target))


def _largest_eigenvalue(a: Matrix, iterations: int = 100) -> float:
    """Power iteration: enough for a ridge and a printed condition number."""
    vector = _probe(a.shape[0])
    value = 0.0
    for _ in range(iterations):
        vector = vector / (np.linalg.norm(vector) or 1.0)
        vector = a @ vector
        previous, value = value, float(np.linalg.norm(vector))
        if abs(value - previous) <= 1e-12 * value:
            break
    return value


def inverse_roots(
    arrays: tuple[npt.NDArray[np.floating], ...],
    *,
    divisor: float,
    exponent: float,
    eps: float,
    relative_eps: bool,
    counts: list[int] | None = None,
) -> tuple[tuple[Matrix, ...], dict[str, float]]:
    """``(A / divisor + ridge I)^(-1/exponent)`` of every array, as a refresh job (see ``refresh/jobs.py``).

    Args:
        counts: how many arrays each dimension has; by default one. Several are the diagonal of one matrix.

    Returns:
        The roots, and the worst condition number and residual. Where no gradient has come, or none whose squares the
        statistics could hold, all of them are zero.
    """
    scaled = iter([np.divide(array, divisor, dtype=np.float64) for array in arrays])
    sides = [[next(scaled) for _ in range(count)] for count in (counts if counts is not None else [1] * len(arrays))]
    if not all(any(matrix.any() for matrix in side) for side in sides):
        # a ridge would be zero too, and a root without one would let the first gradient outweigh all others
        return tuple(np.zeros_like(matrix) for side in sides for matrix in side), {
            "condition_number": 0.0,
            "residual": 0.0,
        }
    found = [one for side in sides for one in _along_diagonal(side, exponent, eps, relative_eps)]
    return tuple(one.root for one in found), {
        "condition_number": max(one.condition_number for one in found),
        "residual": max(one.residual for one in found),
    }


def separate_roots(
    arrays: tuple[npt.NDArray[np.floating], ...], *, counts: list[int] | None = None, **options: Any
) -> list[Mapping[str, Any]] | None:
    """Options with which :func:`inverse_roots` takes each root alone.

    Returns:
        None where a root depends on other matrices: one is zero, not finite, or as small as its diagonal's ridge.
    """
    sizes = iter([largest_magnitude(array) / options["divisor"] for array in arrays])
    for count in counts if counts is not None else [1] * len(arrays):
        side = [next(sizes) for _ in range(count)]
        # twice the ridge: the comparison that counts is made of rounded quotients
        least = 2.0 * options["eps"] * max(side) if options["relative_eps"] and count > 1 else 0.0
        if not all(least < size < math.inf for size in side):
            return None
    return [options] * len(arrays)


def _along_diagonal(matrices: list[Matrix], exponent: float, eps: float, relative_eps: bool) -> list[InverseRoot]:
    """Roots of the matrices along one diagonal, each with a ridge of its own size.

    One that is as small as the whole matrix's ridge, or zero, gets that ridge: relative to itself a part without
    gradients would have none, and when they come the old root would make them outweigh all others.
    """
    sizes = [largest_magnitude(matrix) for matrix in matrices]
    largest = int(np.argmax(sizes))
    small = [relative_eps and i != largest and size <= eps * sizes[largest] for i, size in enumerate(sizes)]
    found = {
        index: inverse_root(matrix, exponent, eps=eps, relative_eps=relative_eps)
        for index, matrix in enumerate(matrices)
        if not small[index]
    }
    ridge = max(one.ridge for one in found.values())
    for index, matrix in enumerate(matrices):
        if small[index]:
            found[index] = inverse_root(matrix, exponent, eps=ridge, relative_eps=False)
    return [found[index] for index in range(len(matrices))]
