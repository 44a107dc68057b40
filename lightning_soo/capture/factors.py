"""Kronecker factors of one part of a layer in one step, as sums over examples: additive over micro-batches and ranks.

With rows ``a`` and per-example gradients ``g`` at ``T`` positions of ``N`` examples (Martens and Grosse 2015, Grosse
and Martens 2016, Eschenhagen et al. 2023)::

    expand:  A = 1/(N T) sum_nt a a^T     G = 1/N sum_nt g g^T
    reduce:  A = 1/N sum_n abar abar^T    G = 1/N sum_n (sum_t g)(sum_t g)^T     abar the mean over t

Where a part has an ``input_shape`` ``(c, s)`` its rows are matrices ``X`` of that shape, and two sums are kept::

    A_c = sum X X^T = tr_s A     A_s = sum X^T X = tr_c A     A ~ A_c (x) A_s / tr A,  tr A = tr A_c = tr A_s

These are the partial traces of the sum ``A``, so they add over examples as it does, and what they make is exact
wherever ``A`` is a Kronecker product. They are what the first power iteration, from the identity, makes of the rank-one
fit of the rearranged ``A`` in Ba, Grosse and Martens (2017). With means instead of sums, both divided by the number of
rows, the same formula holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soo.capture.parts import LayerPart

APPROXIMATIONS = ("expand", "reduce")
# rows of a Gram matrix are converted and multiplied in pieces of at most this many bytes
PIECE = 1 << 26
# a product of narrow numbers is a narrow number: one of so many rows is rounded before it is added up
NARROW_ROWS = 4096
# from this order on about the lower triangle alone is multiplied, in so many panels of columns
PANEL_ORDER, PANELS = 256, 4


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """How sums are formed.

    Attributes:
        approximation: ``"expand"`` or ``"reduce"``.
        gram_dtype: rows are rounded to it before they are multiplied; None multiplies in the precision of the sums.
        positions: of a convolution's output, at most about so many of each example are taken; None takes all.
        phase: decides which.
    """

    approximation: str = "expand"
    gram_dtype: torch.dtype | None = None
    positions: int | None = None
    phase: int = 0


@dataclass
class FactorSums:
    """Sums of one part, ``None`` until the first use.

    Attributes:
        inputs: of shapes ``part.input_factors``: the sum of ``a a^T``, its diagonal, or its two partial traces;
            empty for scales and shifts.
        positions: rows in it.
        gradients: of shape ``part.gradient_factor``: the sum of ``g g^T``, or its diagonal; of scales and shifts that
            of each output's own small matrix.
    """

    inputs: tuple[Tensor, ...] | None = None
    positions: int = 0
    gradients: Tensor | None = None

    def add(self, inputs: tuple[Tensor, ...], positions: int, gradients: Tensor) -> None:
        """Add one use of the layer."""
        # never in place: where one pass is differentiated several times its inputs come again
        known = self.inputs
        self.inputs = inputs if known is None else tuple(a + b for a, b in zip(known, inputs, strict=True))
        self.gradients = gradients if self.gradients is None else self.gradients.add_(gradients)
        self.positions += positions


def input_sums(rows: Tensor, part: LayerPart, how: Statistics) -> tuple[tuple[Tensor, ...], int]:
    """Sums over rows ``a``, of shapes ``part.input_factors`` and at least float32, and the number of rows.

    Args:
        rows: ``(examples, positions, inputs)``.
    """
    if how.approximation == "reduce":
        # examples without a row (an expert that got no tokens) have no mean
        rows = rows.mean(1, dtype=wide_dtype(rows.dtype)) if rows.shape[1] else rows.new_empty(0, rows.shape[2])
    else:
        rows = rows.flatten(0, 1)
    count, dtype = rows.shape[0], wide_dtype(rows.dtype)
    if part.diagonal_inputs:
        return (squares(rows, dtype),), count
    if part.input_shape is not None:
        matrices = rows.reshape(-1, *part.input_shape)
        channels = matrices.transpose(1, 2).reshape(-1, part.input_shape[0])
        return (gram(channels, dtype, how.gram_dtype), gram(matrices.flatten(0, 1), dtype, how.gram_dtype)), count
    return (with_bias(gram(rows, dtype, how.gram_dtype), rows, part),), count


def with_bias(product: Tensor, rows: Tensor, part: LayerPart) -> Tensor:
    """``rows^T rows`` as if a constant one followed every row, where the part's bias is one of its columns."""
    if not part.joint_bias:
        return product
    order = product.shape[0]
    result = product.new_empty(order + 1, order + 1)
    result[:order, :order] = product
    result[order, :order] = result[:order, order] = rows.sum(0, dtype=product.dtype)
    result[order, order] = rows.shape[0]
    return result


def gradient_sum(rows: Tensor, part: LayerPart, how: Statistics) -> Tensor:
    """Sum of ``g g^T``, ``(outputs, outputs)``, or its diagonal, at least float32.

    Args:
        rows: ``(examples, positions, outputs)``.
    """
    rows = rows.sum(1, dtype=wide_dtype(rows.dtype)) if how.approximation == "reduce" else rows.flatten(0, 1)
    dtype = wide_dtype(rows.dtype)
    return squares(rows, dtype) if part.diagonal_outputs else gram(rows, dtype, how.gram_dtype)


def squares(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Diagonal of ``rows^T rows``."""
    return rows.to(dtype).square().sum(0)


def gram(rows: Tensor, dtype: torch.dtype, gram_dtype: torch.dtype | None = None) -> Tensor:
    """``rows^T rows``, added up in ``dtype``; ``(rows, order)`` gives ``(order, order)``.

    Args:
        gram_dtype: what the rows are rounded to; None is ``dtype``.
    """
    order = rows.shape[1]
    result = torch.zeros(order, order, dtype=dtype, device=rows.device)
    narrow = gram_dtype if gram_dtype is not None and gram_dtype.itemsize < dtype.itemsize else None
    size = NARROW_ROWS if narrow is not None else max(1, PIECE // max(1, order * dtype.itemsize))
    width = -(-order // PANELS) if order >= PANEL_ORDER else max(order, 1)
    for piece in torch.split(rows, size):
        piece = piece.to(narrow or dtype)
        for first in range(0, order, width):
            left, right = piece[:, first:].T, piece[:, first : first + width]
            if narrow is None:
                result[first:, first : first + width].addmm_(left, right)
            else:
                result[first:, first : first + width] += left @ right
    return result.tril() + result.tril(-1).T if width < order else result


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
