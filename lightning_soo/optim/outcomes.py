"""The outcome of a refresh as all ranks see it, and as it travels between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_soo.linalg.inverse_roots import largest_magnitude
from lightning_soo.placement.blocks import ArrayLayout
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
        layouts: Sequence[ArrayLayout],
        dtype: torch.dtype,
        *,
        waited: float = 0.0,
        restarts: float = 0.0,
    ) -> Outcome:
        """Check a worker's result: a wrong number or shape, a NaN or an Inf is a failure, whatever the worker says."""
        error, roots = result.error, None
        if not error:
            shapes = [array.shape for array in result.arrays]
            expected = [layout.shape for layout in layouts]
            if shapes != expected:
                error = f"the worker returned shapes {shapes} where {expected} were to come"
            else:
                magnitudes = [largest_magnitude(array) for array in result.arrays]
                if not all(map(math.isfinite, magnitudes)):
                    error = "the worker returned NaN or Inf"
                elif max(magnitudes, default=0.0) > torch.finfo(dtype).max:
                    error = f"roots are too large for {str(dtype).removeprefix('torch.')}: choose another compute_dtype"
                else:
                    # row-major memory of torch's own, as on other ranks: the last bits of products depend on both
                    roots = [torch.tensor(np.ascontiguousarray(array), dtype=dtype) for array in result.arrays]
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


def array_templates(layouts: Sequence[ArrayLayout], dtype: torch.dtype) -> list[Template]:
    """Layout of arrays on their way: half of each symmetric matrix."""
    return [(_packed_shape(*layout.shape[:1]) if layout.symmetric else layout.shape, dtype) for layout in layouts]


def message_size(layouts: Sequence[ArrayLayout], dtype: torch.dtype, *, with_roots: bool = True) -> int:
    """Bytes of one outcome's message: a header, then each array."""
    return template_size([_HEADER, *(array_templates(layouts, dtype) if with_roots else ())])


def pack(
    outcome: Outcome, layouts: Sequence[ArrayLayout], dtype: torch.dtype, *, with_roots: bool = True
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
        return [header, *(torch.zeros(shape, dtype=dtype) for shape, _ in array_templates(layouts, dtype))]
    return [header, *(pack_array(root, layout) for root, layout in zip(outcome.roots, layouts, strict=True))]


def unpack(
    flat: Tensor,
    layouts: Sequence[ArrayLayout],
    dtype: torch.dtype,
    owner: int,
    *,
    with_roots: bool = True,
) -> Outcome:
    """The outcome that rank ``owner`` packed."""
    header, *packed = unpack_bytes(flat, [_HEADER, *(array_templates(layouts, dtype) if with_roots else ())])
    ok, condition_number, residual, seconds, waited, restarts = header.tolist()
    roots = None
    if with_roots:
        roots = [unpack_array(part, layout) for part, layout in zip(packed, layouts, strict=True)]
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


def pack_array(array: Tensor, layout: ArrayLayout) -> Tensor:
    """What is sent of one array."""
    return pack_symmetric(array) if layout.symmetric else array


def unpack_array(packed: Tensor, layout: ArrayLayout) -> Tensor:
    """Inverse of :func:`pack_array`."""
    return unpack_symmetric(packed, layout.shape[0]) if layout.symmetric else packed.clone()


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
