"""The trust-region subproblem by truncated conjugate gradients (Steihaug 1983; Nocedal and Wright 2006, algorithm 7.2).

Minimise ``m(s) = <g, s> + <s, H s> / 2`` over ``|s| <= radius``, where H is known by its products with vectors alone
and may have negative eigenvalues. With a preconditioner M the norm is ``sqrt(<s, M s>)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
Gram = Callable[[Sequence[Tensor]], Tensor]

_CHUNK = 1 << 16  # elements that stay in cache while they are multiplied
_CANCELLED = 1e-8  # of the old squared residual: below it, what a recurrence says of the new one is rounding


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An approximate minimiser of the model inside one radius.

    Attributes:
        step: s, as the gradient is laid out.
        norm: of s, in the norm of the region.
        radius: of the region in which it was looked for.
        model: ``m(s)``; at most zero.
        on_boundary: whether the region has stopped the iteration, by its edge or by negative curvature.
        negative_curvature: whether a direction with ``<d, H d> <= 0`` was met.
        iterations: products with H that it took.
    """

    step: Tensor
    norm: float
    radius: float
    model: float
    on_boundary: bool
    negative_curvature: bool
    iterations: int


def gram_matrix(vectors: Sequence[Tensor]) -> Tensor:
    """All inner products of a few vectors of one length: (k, k), float64 on the CPU, each vector read once."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors[0].device)
    chunk = _CHUNK if vectors[0].device.type == "cpu" else _CHUNK << 6
    for pieces in zip(*(torch.split(vector, chunk) for vector in vectors), strict=True):
        block = torch.stack(pieces).double()
        total.addmm_(block, block.T)
    return total.cpu()


def boundary_crossings(distance: float, along: float, length: float, radius: float) -> tuple[float, float]:
    """Both t with ``|s + t d| = radius``, the smaller one first.

    Args:
        distance, along, length: ``<s, s>``, ``<s, d>`` and ``<d, d>``.
    """
    root = math.sqrt(max(along * along - length * (distance - radius * radius), 0.0))
    # the larger of the two in magnitude without cancellation; their product is known
    larger = -(along + math.copysign(root, along))
    first, second = larger / length, (distance - radius * radius) / larger if larger else 0.0
    return min(first, second), max(first, second)


@dataclass(frozen=True)
class _Line:
    """The model and the norm along ``s + t d``: ``m(s)``, ``-<d, m'(s)>``, ``<d, H d>``, ``<s, s>``, ``<s, d>``,
    ``<d, d>``."""

    model: float
    slope: float
    curvature: float
    distance: float
    along: float
    length: float

    @property
    def minimum(self) -> float:
        """t of the smallest model; infinite where there is none."""
        return self.slope / self.curvature if self.curvature > 0 else math.inf

    def squared_norm(self, t: float) -> float:
        return self.distance + 2 * t * self.along + t * t * self.length if math.isfinite(t) else math.inf

    def model_at(self, t: float) -> float:
        return self.model - t * self.slope + t * t / 2 * self.curvature

    def leave(self, radius: float) -> float:
        """t where the line leaves a region: ahead, or on the better side where the model falls without end."""
        crossings = boundary_crossings(self.distance, self.along, self.length, radius)
        return min(crossings, key=self.model_at) if self.curvature <= 0 else crossings[1]


def steihaug(
    product: Product,
    gradient: Tensor,
    radius: float,
    *,
    tolerance: float,
    max_iterations: int,
    precondition: Product | None = None,
    gram: Gram = gram_matrix,
    smaller_radii: Sequence[float] = (),
    stored: int = 4,
    scale: float = 1.0,
) -> list[Solution]:
    """Solve one subproblem, and on the way those of smaller radii, which cost nothing more.

    Conjugate gradients from zero have growing norms, so a smaller region's iterates are the first ones of a larger
    region's: the solution for a smaller radius is where this iteration leaves that region.

    Args:
        product: v -> H v.
        gradient: g, flat and not zero; of all ranks or this rank's part, as ``gram`` has it.
        tolerance: stop where the residual's Euclidean norm is at most this; below that of the gradient.
        max_iterations: products with H at most; at least one.
        precondition: r -> M^-1 r, linear and positive definite.
        gram: inner products of vectors laid out like ``gradient``, summed over ranks: one call for each iteration.
        smaller_radii: below ``radius``.
        stored: how many of them are solved at most, the largest of those inside which the solution does not lie.
        scale: a power of two by which the whole model is multiplied while it is minimised, where products with the
            gradient itself would overflow or vanish.

    Returns:
        The solution, then those of smaller radii, largest first. Each is a vector like ``gradient``.

    Raises:
        FloatingPointError: a product that is not finite.
    """
    waiting = sorted((value for value in smaller_radii if 0 < value < radius), reverse=True)
    found: list[Solution] = []
    step, residual = torch.zeros_like(gradient), gradient * scale
    tolerance *= scale
    preconditioned = precondition(residual) if precondition is not None else residual
    direction = preconditioned.neg()
    image = residual.neg() if precondition is not None else direction  # M d
    model, distance = 0.0, 0.0
    for iteration in range(1, max_iterations + 1):
        curved = product(direction) if scale == 1.0 else product(direction) * scale
        moved = precondition(curved) if precondition is not None else curved
        vectors = [step, direction, residual, curved]
        vectors += [image, preconditioned, moved] if precondition is not None else []
        s, d, r, h, i, p, m = range(7) if precondition is not None else (0, 1, 2, 3, 1, 2, 3)
        inner = gram(vectors)
        if not bool(torch.isfinite(inner).all()):
            raise FloatingPointError(f"product {iteration} with the curvature is not finite")
        entry = inner.tolist()
        # <r, M^-1 r> = -<r, d>
        line = _Line(model, entry[r][p], entry[d][h], distance, entry[s][i], entry[d][i])
        alpha = line.minimum
        distance = line.squared_norm(alpha)
        crossed = []
        while waiting and distance >= waiting[-1] ** 2:
            crossed.append(waiting.pop())
        if crossed and stored:
            found += [_left(line, one, step, direction, iteration, scale) for one in crossed[-stored:]]
            del found[:-stored]
        if distance >= radius * radius:
            return [_left(line, radius, step, direction, iteration, scale), *reversed(found)]
        step.add_(direction, alpha=alpha)
        residual.add_(curved, alpha=alpha)
        if precondition is not None:
            preconditioned.add_(moved, alpha=alpha)
        model = line.model_at(alpha)
        # of the new residual, by one reduction with everything else
        squared = entry[r][r] + 2 * alpha * entry[r][h] + alpha * alpha * entry[h][h]
        slope = line.slope + 2 * alpha * entry[p][h] + alpha * alpha * entry[h][m]
        if squared < _CANCELLED * entry[r][r] or slope < _CANCELLED * line.slope:
            exact = gram([residual, preconditioned]).tolist()
            squared, slope = exact[0][0], exact[0][1]
        if math.sqrt(squared) <= tolerance:
            break
        direction.mul_(slope / line.slope).sub_(preconditioned)
        if precondition is not None:
            image.mul_(slope / line.slope).sub_(residual)
    whole = Solution(
        step=step,
        norm=math.sqrt(distance),
        radius=radius,
        model=model / scale,
        on_boundary=False,
        negative_curvature=False,
        iterations=iteration,
    )
    return [whole, *reversed(found)]


def _left(line: _Line, radius: float, step: Tensor, direction: Tensor, iteration: int, scale: float) -> Solution:
    t = line.leave(radius)
    return Solution(
        step=step.add(direction, alpha=t),
        norm=radius,
        radius=radius,
        model=line.model_at(t) / scale,
        on_boundary=True,
        negative_curvature=line.curvature <= 0,
        iterations=iteration,
    )
