"""Products of a matrix with its own transpose, in panels, against whole products in float64."""

from __future__ import annotations

import pytest
import torch

from lightning_soo.linalg.symmetric import add_gram_


@pytest.mark.parametrize("order", [1, 7, 63, 129, 200, 513, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_whole_product_and_stays_symmetric(order: int, dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(order)
    rows = torch.randn(order, 37, generator=generator, dtype=torch.float64)
    start = torch.randn(order, 11, generator=generator, dtype=torch.float64)
    start = start @ start.T
    expected = 0.9 * start + 0.25 * rows @ rows.T
    target = start.to(dtype)
    target = torch.triu(target) + torch.triu(target, 1).T  # rounded alike on both sides
    given = rows.T.contiguous().T.to(dtype) if transposed else rows.to(dtype)
    add_gram_(target, given, beta=0.9, alpha=0.25)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    assert (target - target.T).abs().max() <= tolerance * expected.abs().max()
    assert (target - expected).abs().max() <= tolerance * expected.abs().max()
