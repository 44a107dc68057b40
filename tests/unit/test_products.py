"""Products along dimensions, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_soo.linalg.products import multiply, multiply_together

RANGES = {6: [(0, 2), (2, 4), (4, 6)], 5: [(0, 2), (2, 5)], 4: [(0, 4)]}


def dense(matrices: list[Tensor]) -> Tensor:
    return torch.block_diag(*matrices)


def along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    return torch.tensordot(matrix, x, dims=([1], [dim])).movedim(0, dim)


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (4, 6), (6, 4, 5), (5, 6, 2, 4)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_several_matrices_along_a_diagonal(shape: tuple[int, ...], symmetric: bool, stacked: bool) -> None:
    torch.manual_seed(0)
    count = 3 if stacked else 1
    dims = [dim for dim, size in enumerate(shape) if size in RANGES]
    ranges = [RANGES[shape[dim]] for dim in dims]
    x = torch.randn(count, *shape, dtype=torch.float64)
    matrices = [
        [torch.randn(count, stop - start, stop - start, dtype=torch.float64) for start, stop in found]
        for found in ranges
    ]
    if symmetric:
        matrices = [[matrix + matrix.mT for matrix in found] for found in matrices]
    flat = [matrix if stacked else matrix[0] for found in matrices for matrix in found]
    got = multiply(x if stacked else x[0], dims, flat, ranges=ranges, symmetric=symmetric)
    for index, (one, expected) in enumerate(zip(got if stacked else [got], x, strict=True)):
        for dim, found in zip(dims, matrices, strict=True):
            expected = along(expected, dim, dense([matrix[index] for matrix in found]))
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_equal_ones_in_one_batched_product(dim: int) -> None:
    torch.manual_seed(0)
    shape = [5, 7, 3]
    shape[dim] = 8
    x = torch.randn(2, *shape, dtype=torch.float64)
    matrices = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    together = multiply_together(x, dim, matrices)
    for one, given, own in zip(together, x, matrices, strict=True):
        torch.testing.assert_close(one, along(given, dim, dense(list(own))), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(multiply_together(given, dim, own), one, rtol=1e-12, atol=1e-12)
