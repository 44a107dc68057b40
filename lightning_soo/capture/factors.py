"""Kronecker factors of one part of a layer in one step, as sums over examples: additive over micro-batches and ranks.

With rows ``a`` and per-example gradients ``g`` at ``T`` positions of ``N`` examples (Martens and Grosse 2015, Grosse
and Martens 2016, Eschenhagen et al. 2023)::

    expand:  A = 1/(N T) sum_nt a a^T     G = 1/N sum_nt g g^T
    reduce:  A = 1/N sum_n abar abar^T    G = 1/N sum_n (sum_t g)(sum_t g)^T     abar the mean over t
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

APPROXIMATIONS = ("expand", "reduce")
# rows of a Gram matrix are converted and multiplied in pieces of at most this many bytes
PIECE = 1 << 26


@dataclass
class FactorSums:
    """Sums of one part, ``None`` until the first use.

    Attributes:
        inputs: ``(columns, columns)``, sum of ``a a^T``.
        positions: rows in it.
        gradients: ``(outputs, outputs)``, sum of ``g g^T``.

    Of embeddings the first is a diagonal, ``(columns,)``; of scales and shifts there is none, and the last is
    ``(outputs, 2, 2)``.
    """

    inputs: Tensor | None = None
    positions: int = 0
    gradients: Tensor | None = None

    def add(self, inputs: Tensor | None, positions: int, gradients: Tensor) -> None:
        """Add one use of the layer."""
        if inputs is not None:
            # never in place: where one pass is differentiated several times its inputs come again
            self.inputs = inputs if self.inputs is None else self.inputs + inputs
        self.gradients = gradients if self.gradients is None else self.gradients.add_(gradients)
        self.positions += positions


def input_sum(rows: Tensor, approximation: str, *, bias: bool) -> tuple[Tensor, int]:
    """Sum of ``a a^T`` and the number of rows.

    Args:
        rows: ``(examples, positions, inputs)``.
        bias: whether a constant one follows the inputs.

    Returns:
        ``(inputs + bias, inputs + bias)``, at least float32.
    """
    rows = rows.mean(1) if approximation == "reduce" else rows.flatten(0, 1)
    order = rows.shape[1]
    result = torch.zeros(order + bias, order + bias, dtype=wide_dtype(rows.dtype), device=rows.device)
    gram(rows, out=result[:order, :order])
    if bias:
        result[order, :order] = result[:order, order] = rows.sum(0, dtype=result.dtype)
        result[order, order] = rows.shape[0]
    return result, rows.shape[0]


def gradient_sum(rows: Tensor, approximation: str) -> Tensor:
    """Sum of ``g g^T``, ``(outputs, outputs)``, at least float32, of ``(examples, positions, outputs)``."""
    rows = rows.sum(1) if approximation == "reduce" else rows.flatten(0, 1)
    result = torch.zeros(rows.shape[1], rows.shape[1], dtype=wide_dtype(rows.dtype), device=rows.device)
    gram(rows, out=result)
    return result


def gram(rows: Tensor, *, out: Tensor) -> None:
    """Add ``rows^T rows`` to ``out``, in its precision and in pieces."""
    size = max(1, PIECE // max(1, rows.shape[1] * out.element_size()))
    for piece in torch.split(rows, size):
        wide = piece.to(out.dtype)
        out.addmm_(wide.T, wide)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
