"""A tensor times matrices along its dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]


def multiply(
    x: Tensor,
    dims: Sequence[int],
    matrices: Sequence[Tensor],
    *,
    ranges: Sequence[Ranges] | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Multiply along each of ``dims``: ``M @ unfold_dim(x)``.

    Args:
        x: one block, or a stack of them with the stacks of their matrices.
        ranges: of each of ``dims``, the ranges of its matrices: ``M`` has them along its diagonal, in their order, and
            zeros elsewhere. None: one matrix for each of ``dims``.
        symmetric: whether all matrices are, exactly: a CPU's bfloat16 product of two matrices as they lie in memory is
            an eighth faster than one with a transposed matrix.
    """
    first = matrices[0].ndim - 2 if matrices else 0  # 1 in a stack
    rest = iter(matrices)
    for position, dim in enumerate(dims):
        pieces = ranges[position] if ranges is not None else ()
        if len(pieces) < 2:
            x = _multiply_along(x, dim, next(rest), symmetric)
            continue
        own = [next(rest) for _ in pieces]
        # one start instead of many; a CPU needs none, and copies less one after the other
        if x.device.type != "cpu" and len({stop - start for start, stop in pieces}) == 1:
            x = multiply_together(x, dim, torch.stack(own, dim=-3))
            continue
        parts = [
            _multiply_along(x.narrow(first + dim, start, stop - start), dim, matrix, symmetric)
            for (start, stop), matrix in zip(pieces, own, strict=True)
        ]
        x = torch.cat(parts, dim=first + dim)
    return x


def multiply_together(x: Tensor, dim: int, matrices: Tensor) -> Tensor:
    """Multiply along one dimension by equal matrices on the diagonal, in one batched product.

    Args:
        x: one block, or a stack of them.
        matrices: ``(pieces, n, n)``, or the stack of these.
    """
    first = matrices.ndim - 3
    moved = x.movedim(first + dim, first)
    unfolded = moved.reshape(*moved.shape[:first], *matrices.shape[-3:-1], -1)
    return (matrices @ unfolded).reshape(moved.shape).movedim(first, first + dim)


def _multiply_along(x: Tensor, dim: int, matrix: Tensor, symmetric: bool) -> Tensor:
    first = matrix.ndim - 2
    if x.ndim - first == 2:
        return matrix @ x if dim == 0 else x @ (matrix if symmetric else matrix.mT)
    moved = x.movedim(first + dim, first)
    unfolded = moved.reshape(*moved.shape[: first + 1], -1)
    return (matrix @ unfolded).reshape(moved.shape).movedim(first, first + dim)
