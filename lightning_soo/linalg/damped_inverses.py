"""Inverses of damped Kronecker products, for workers: numpy alone.

With factors ``A`` (inputs) and ``G`` (output gradients) of a layer and damping ``lambda`` (Martens and Grosse 2015)::

    exact:  (G (x) A + lambda I)^-1 V = Q_G [ (Q_G^T V Q_A) / (d_G d_A^T + lambda) ] Q_A^T
    pi:     (G + sqrt(lambda) / pi I)^-1 V (A + pi sqrt(lambda) I)^-1    pi^2 = (tr A / dim A) / (tr G / dim G)

The exact form needs the eigenvectors of all factors, and follows a damping that changes; ``pi`` needs their inverses.
There may be one factor, two or three (of gradients, channels and space); each is a matrix ``(n, n)``, a diagonal
``(n,)``, or a stack of small matrices ``(m, k, k)``, which stands alone.
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


def eigen_decompositions(
    factors: Sequence[Array], *, divisor: float = 1.0
) -> tuple[tuple[Array, ...], dict[str, float]]:
    """Of each symmetric positive semi-definite factor its eigenvectors, and of all their eigenvalues.

    Args:
        divisor: of every factor.

    Returns:
        Eigenvectors in columns for each factor that is no diagonal, then eigenvalues, at least zero, for each; float64.

    Raises:
        FactorError: a factor is not finite.
    """
    vectors, values = [], []
    residual = 0.0
    for factor in _prepared(factors, divisor):
        if factor.ndim == 1:
            values.append(np.maximum(factor, 0.0))
            continue
        found, basis = np.linalg.eigh(factor)
        vectors.append(basis)
        values.append(np.maximum(found, 0.0))
        deviation = np.abs(basis.swapaxes(-1, -2) @ basis - np.eye(basis.shape[-1]))
        residual = max(residual, float(deviation.max()))
    return (*vectors, *values), {"condition_number": _condition(values), "residual": residual}


def factored_inverses(
    factors: Sequence[Array], *, damping: float, divisor: float = 1.0
) -> tuple[tuple[Array, ...], dict[str, float]]:
    """``(F + share I)^-1`` of every factor, float64; a diagonal gives a diagonal.

    Args:
        damping: ``lambda``, above zero; its shares are those of :func:`shares_of_damping`.
        divisor: of every factor.

    Returns:
        The inverses, and the worst condition number (in the 1-norm) and residual.

    Raises:
        FactorError: a factor is not finite, or not positive definite with its share of the damping.
    """
    prepared = _prepared(factors, divisor)
    inverses = []
    condition, residual = 1.0, 0.0
    for factor, share in zip(prepared, shares_of_damping(prepared, damping), strict=True):
        damped = factor + (share if factor.ndim == 1 else share * np.eye(factor.shape[-1]))
        if factor.ndim == 1:
            _require(damped.min() > 0.0, damping)
            inverses.append(1.0 / damped)
            condition = max(condition, float(damped.max() / damped.min()))
            continue
        # a third of the time of eigenvalues, which nobody needs here
        try:
            np.linalg.cholesky(damped)
        except np.linalg.LinAlgError:
            _require(False, damping)
        inverse = np.linalg.inv(damped)
        inverse = (inverse + inverse.swapaxes(-1, -2)) / 2
        inverses.append(inverse)
        norms = [np.abs(matrix).sum(-1).max(-1) for matrix in (damped, inverse)]
        condition = max(condition, float((norms[0] * norms[1]).max()))
        residual = max(residual, float(np.abs(inverse @ damped - np.eye(factor.shape[-1])).max()))
    return tuple(inverses), {"condition_number": condition, "residual": residual}


def _require(positive: bool, damping: float) -> None:
    if not positive:
        raise FactorError(
            f"a factor is not positive definite with damping {damping:g}",
            {"condition_number": math.inf, "residual": math.inf},
        )


def shares_of_damping(factors: Sequence[Array], damping: float) -> list[float]:
    """What is added to each factor: its share of ``damping``, proportional to its mean eigenvalue.

    Of two factors ``sqrt(lambda) / pi`` and ``pi sqrt(lambda)``. Equal shares where a factor has no trace: a layer that
    was not used yet, or whose gradients vanish.
    """
    share: float = damping ** (1.0 / len(factors))
    if len(factors) == 1:
        return [share]
    means = [float(factor.mean() if factor.ndim == 1 else np.trace(factor) / len(factor)) for factor in factors]
    if not min(means) > 0.0:
        return [share] * len(factors)
    geometric = math.exp(sum(map(math.log, means)) / len(means))
    return [share * mean / geometric for mean in means]


def _prepared(factors: Sequence[Array], divisor: float) -> list[Array]:
    """Factors in float64; of channels and space, which are the partial traces of one factor, the product is that one's
    best fit only after division by its trace."""
    found = []
    for factor in factors:
        wide = np.asarray(factor, dtype=np.float64) / divisor
        if not np.isfinite(wide).all():
            raise FactorError("a factor is not finite", {"condition_number": math.inf, "residual": math.inf})
        found.append(wide)
    if len(found) == 3:
        trace = float(np.trace(found[2]))
        found[2] = found[2] / trace if trace > 0.0 else found[2]
    return found


def _condition(values: Sequence[Array]) -> float:
    """The worst condition number; infinite where a factor is singular."""
    worst = 1.0
    for found in values:
        smallest, largest = float(np.min(found)), float(np.max(found))
        worst = max(worst, largest / smallest if smallest > 0.0 else math.inf)
    return worst
