"""Inverses of damped Kronecker products, for workers: numpy alone.

With factors ``A`` (inputs) and ``G`` (output gradients) of a layer and damping ``lambda`` (Martens and Grosse 2015)::

    exact:  (G (x) A + lambda I)^-1 V = Q_G [ (Q_G^T V Q_A) / (d_G d_A^T + lambda) ] Q_A^T
    pi:     (G + sqrt(lambda) / pi I)^-1 V (A + pi sqrt(lambda) I)^-1    pi^2 = (tr A / dim A) / (tr G / dim G)

The exact form needs the eigenvectors of both factors, and follows a damping that changes; ``pi`` needs two inverses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_soo.linalg.errors import MatrixError

Array = npt.NDArray[Any]


class FactorError(MatrixError):
    """No usable inverse."""


def eigen_decompositions(matrices: Sequence[Array]) -> tuple[tuple[Array, ...], dict[str, float]]:
    """Of each symmetric positive semi-definite factor its eigenvectors, and of all their eigenvalues.

    Returns:
        ``(n, n)`` eigenvectors in columns for each factor, then ``(n,)`` eigenvalues, at least zero, for each; float64.

    Raises:
        FactorError: a factor is not finite.
    """
    vectors, values = [], []
    for matrix in map(_checked, matrices):
        found, basis = np.linalg.eigh(matrix)
        vectors.append(basis)
        values.append(np.maximum(found, 0.0))
    residual = max(float(np.abs(basis.T @ basis - np.eye(len(basis))).max()) for basis in vectors)
    return (*vectors, *values), {"condition_number": _condition(values), "residual": residual}


def factored_inverses(matrices: Sequence[Array], *, damping: float) -> tuple[tuple[Array, ...], dict[str, float]]:
    """``(A + pi sqrt(lambda) I)^-1`` and ``(G + sqrt(lambda) / pi I)^-1`` of ``(A, G)``, float64.

    Args:
        damping: ``lambda``, above zero.

    Raises:
        FactorError: a factor is not finite, or not positive definite with its share of the damping.
    """
    inputs, gradients = map(_checked, matrices)
    pi = split_of_damping(inputs, gradients)
    found, values = [], []
    for matrix, share in ((inputs, pi), (gradients, 1.0 / pi)):
        damped = matrix + share * math.sqrt(damping) * np.eye(len(matrix))
        eigenvalues, vectors = np.linalg.eigh(damped)
        if not eigenvalues[0] > 0.0:
            raise FactorError(
                f"a factor is not positive definite with damping {damping:g}: smallest eigenvalue {eigenvalues[0]:.2g}",
                {"condition_number": math.inf, "residual": math.inf},
            )
        inverse = (vectors / eigenvalues) @ vectors.T
        found.append((inverse + inverse.T) / 2)
        values.append(eigenvalues)
    residual = max(
        float(np.abs(inverse @ (matrix + share * math.sqrt(damping) * np.eye(len(matrix))) - np.eye(len(matrix))).max())
        for inverse, matrix, share in zip(found, (inputs, gradients), (pi, 1.0 / pi), strict=True)
    )
    return tuple(found), {"condition_number": _condition(values), "residual": residual}


def split_of_damping(inputs: Array, gradients: Array) -> float:
    """``pi``; 1 where a factor has no trace: a layer that was not used yet, or whose gradients vanish."""
    mean_input, mean_gradient = np.trace(inputs) / len(inputs), np.trace(gradients) / len(gradients)
    if not (mean_input > 0.0 and mean_gradient > 0.0):
        return 1.0
    return math.sqrt(float(mean_input) / float(mean_gradient))


def _checked(matrix: Array) -> Array:
    wide = np.asarray(matrix, dtype=np.float64)
    if not np.isfinite(wide).all():
        raise FactorError("a factor is not finite", {"condition_number": math.inf, "residual": math.inf})
    return wide


def _condition(values: Sequence[Array]) -> float:
    """The worst condition number; infinite where a factor is singular."""
    worst = 1.0
    for found in values:
        smallest, largest = float(np.min(found)), float(np.max(found))
        worst = max(worst, largest / smallest if smallest > 0.0 else math.inf)
    return worst
