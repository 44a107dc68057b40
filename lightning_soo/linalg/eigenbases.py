"""Eigenbases of statistics, for workers: numpy alone.

A basis is not unique where eigenvalues coincide, above all in the null space of a statistic that has seen fewer
gradients than its order: two runs that only sum in another order would rotate it at random. Such clusters are turned to
a fixed position, which depends on the space they span and not on how it was computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_soo.linalg.errors import MatrixError

Array = npt.NDArray[Any]


class EigenbasisError(MatrixError):
    """No usable basis."""


def eigenbases(matrices: Sequence[Array], *, tolerance: float) -> tuple[tuple[Array, ...], dict[str, float]]:
    """Orthonormal eigenvectors of each symmetric matrix, in columns, by ascending eigenvalue.

    Args:
        matrices: ``(n, n)``, of which the lower triangle is read.
        tolerance: eigenvalues closer than this, relative to the largest, count as one.

    Returns:
        The bases in float64 and the worst ``condition_number`` and ``residual`` (of orthonormality).

    Raises:
        EigenbasisError: a matrix is not finite, or its basis is not orthonormal.
    """
    found = []
    condition = residual = 0.0
    for matrix in matrices:
        if not np.isfinite(matrix).all():
            raise EigenbasisError("a statistic is not finite", {"condition_number": np.inf, "residual": np.inf})
        basis, values = eigenbasis(matrix, tolerance=tolerance)
        found.append(basis)
        smallest = max(float(values[0]), 0.0)
        condition = max(condition, float(values[-1]) / smallest if smallest > 0 else np.inf)
        residual = max(residual, float(np.abs(basis.T @ basis - np.eye(len(basis))).max()))
    if residual > 1e-8:
        raise EigenbasisError(
            f"a basis is not orthonormal: off by {residual:.2g}", {"condition_number": condition, "residual": residual}
        )
    return tuple(found), {"condition_number": condition, "residual": residual}


def separate_bases(matrices: Sequence[Array], **options: Any) -> list[Mapping[str, Any]]:
    """Options with which :func:`eigenbases` computes each basis alone."""
    return [options] * len(matrices)


def eigenbasis(matrix: Array, *, tolerance: float) -> tuple[Array, Array]:
    """Eigenvectors ``(n, n)`` in columns and ascending eigenvalues; clusters in their fixed position."""
    values, vectors = np.linalg.eigh(np.asarray(matrix, dtype=np.float64))
    edges = np.flatnonzero(np.diff(values) > tolerance * max(float(values[-1]), 0.0)) + 1
    for cluster in np.split(np.arange(len(values)), edges):
        if len(cluster) > 1:
            vectors[:, cluster] = _settle(vectors[:, cluster])
    return vectors, values


def _settle(vectors: Array) -> Array:
    """``V -> V polar(V^T R)`` with a fixed ``R``: the same for every orthonormal basis ``V`` of one space."""
    order, size = vectors.shape
    reference = np.random.default_rng(0).standard_normal((order, size))
    left, _, right = np.linalg.svd(vectors.T @ reference)
    settled: Array = vectors @ (left @ right)
    return settled
