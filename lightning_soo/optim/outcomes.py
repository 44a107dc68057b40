"""The outcome of a refresh as all ranks see it, and as it travels between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_soo.refresh.jobs import JobResult
from lightning_soo.transport import template_size, unpack_bytes

Template = tuple[tuple[int, ...], torch.dtype]
# ok, condition number, residual, seconds, waited, restarts
_HEADER: Template = ((6,), torch.float64)


@dataclass(kw_only=True)
class Outcome:
    """A finished refresh.

    Attributes:
        ok: whether it gave verified roots.
        roots: on the refresher and where the block is applied; None elsewhere, and where it failed.
        seconds: what the computation took.
        waited, restarts: seconds the refresher's training thread has waited for results so far, and workers it has
            replaced.
    """

    ok: bool
    roots: list[Tensor] | None
    condition_number: float
    residual: float
    seconds: float
    waited: float = 0.0
    restarts: float = 0.0
    error: str = ""

    @classmethod
    def of(
        cls,
        result: JobResult,
        orders: Sequence[int],
        dtype: torch.dtype,
        *,
        waited: float = 0.0,
        restarts: float = 0.0,
    ) -> Outcome:
        """Check a worker's result: a wrong number or shape, a NaN or an Inf is a failure, whatever the worker says."""
        error, roots = result.error, None
        if not error:
            shapes = [array.shape for array in result.arrays]
            if shapes != [(order, order) for order in orders]:
                error = f"the worker returned shapes {shapes} for orders {list(orders)}"
            elif not all(np.isfinite(array).all() for array in result.arrays):
                error = "the worker returned NaN or Inf"
            else:
                roots = [torch.from_numpy(array).to(dtype) for array in result.arrays]
        return cls(
            ok=roots is not None,
            roots=roots,
            condition_number=result.diagnostics.get("condition_number", float("nan")),
            residual=result.diagnostics.get("residual", float("nan")),
            seconds=result.seconds,
            waited=waited,
            restarts=restarts,
            error=error,
        )


def matrix_templates(orders: Sequence[int], dtype: torch.dtype, symmetric: bool = True) -> list[Template]:
    """Layout of matrices on their way: half of each symmetric one."""
    return [(_packed_shape(order) if symmetric else (order, order), dtype) for order in orders]


def message_size(orders: Sequence[int], dtype: torch.dtype, symmetric: bool, *, with_roots: bool = True) -> int:
    """Bytes of one outcome's message: a header, then each matrix."""
    return template_size([_HEADER, *(matrix_templates(orders, dtype, symmetric) if with_roots else ())])


def pack(
    outcome: Outcome, orders: Sequence[int], dtype: torch.dtype, symmetric: bool, *, with_roots: bool = True
) -> list[Tensor]:
    """Tensors of one message; a failure has the same size, so that sizes come from the plan alone."""
    header = torch.tensor(
        [
            float(outcome.ok),
            outcome.condition_number,
            outcome.residual,
            outcome.seconds,
            outcome.waited,
            outcome.restarts,
        ],
        dtype=torch.float64,
    )
    if not with_roots:
        return [header]
    if outcome.roots is None:
        return [header, *(torch.zeros(shape, dtype=dtype) for shape, _ in matrix_templates(orders, dtype, symmetric))]
    return [header, *(pack_symmetric(root) if symmetric else root for root in outcome.roots)]


def unpack(
    flat: Tensor,
    orders: Sequence[int],
    dtype: torch.dtype,
    symmetric: bool,
    owner: int,
    *,
    with_roots: bool = True,
) -> Outcome:
    """The outcome that rank ``owner`` packed."""
    header, *packed = unpack_bytes(flat, [_HEADER, *(matrix_templates(orders, dtype, symmetric) if with_roots else ())])
    ok, condition_number, residual, seconds, waited, restarts = header.tolist()
    roots = packed if with_roots else None
    if with_roots and symmetric:
        roots = [unpack_symmetric(part, order) for part, order in zip(packed, orders, strict=True)]
    return Outcome(
        ok=bool(ok),
        roots=roots if ok else None,
        condition_number=condition_number,
        residual=residual,
        seconds=seconds,
        waited=waited,
        restarts=restarts,
        error="" if ok else f"failed on rank {owner}",
    )


def pack_symmetric(matrix: Tensor) -> Tensor:
    """``(n, n)`` symmetric -> about half the elements, by block copies: no index arithmetic.

    The square is cut into quarters of order ``h = ceil(n / 2)``: the lower left one is kept whole, and the two on the
    diagonal share one ``(h + 1, h)`` rectangle, one as its lower and one as its upper triangle.
    """
    order = matrix.shape[0]
    half = (order + 1) // 2
    packed = matrix.new_zeros(_packed_shape(order))
    packed[1 : half + 1, :half] = matrix[:half, :half].tril()
    rest = order - half
    packed[:rest, :rest] += matrix[half:, half:].triu()
    packed[half + 1 :, :half] = matrix[half:, :half]
    return packed


def unpack_symmetric(packed: Tensor, order: int) -> Tensor:
    """Inverse of :func:`pack_symmetric`."""
    half = (order + 1) // 2
    rest = order - half
    matrix = packed.new_empty(order, order)
    lower = packed[1 : half + 1, :half].tril()
    matrix[:half, :half] = lower + lower.tril(-1).T
    upper = packed[:rest, :rest].triu()
    matrix[half:, half:] = upper + upper.triu(1).T
    matrix[half:, :half] = packed[half + 1 :, :half]
    matrix[:half, half:] = packed[half + 1 :, :half].T
    return matrix


def _packed_shape(order: int) -> tuple[int, int]:
    half = (order + 1) // 2
    return half + 1 + (order - half), half
