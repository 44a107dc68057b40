"""Properties of the step itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_soo import Shampoo

OPTIONS: dict[str, Any] = {"lr": 0.02, "precondition_frequency": 3, "start_preconditioning_step": 2, "refresh_delay": 2}


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def run(net: nn.Module, optimizer: Shampoo, first: int, last: int, parts: int = 1) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        x = batch(step, next(net.parameters()).dtype)
        for part in x.chunk(parts):
            (net(part).square().mean() / parts).backward()
        optimizer.step()


def values(net: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])


def test_executors_give_the_same_bits() -> None:
    found = []
    for workers in ("inline", "thread", {"kind": "thread", "count": 2}):
        net = model(torch.float32)
        optimizer = Shampoo(net, **OPTIONS, workers=workers)
        run(net, optimizer, 0, 15)
        optimizer.close()
        found.append(values(net))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_blocks_equal_parameters_of_their_own() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 6, dtype=torch.float64), torch.randn(10, 8, 6, dtype=torch.float64)
    options = {**OPTIONS, "grafting_norm": "block", "refresh_delay": 0, "stagger": False}
    options["exponent_override"] = "2k"  # that of None depends on the whole parameter
    whole = nn.Parameter(start.clone())
    parts = [nn.Parameter(start[i : i + 4, j : j + 3].clone()) for i in (0, 4) for j in (0, 3)]
    # 8 x 6 at 4 is cut into 4 x 3 pieces: evenly
    one, many = Shampoo([whole], max_preconditioner_dim=4, **options), Shampoo(parts, **options)
    for gradient in gradients:
        whole.grad = gradient.clone()
        for part, (i, j) in zip(parts, [(0, 0), (0, 3), (4, 0), (4, 3)], strict=True):
            part.grad = gradient[i : i + 4, j : j + 3].clone()
        one.step()
        many.step()
    for part, (i, j) in zip(parts, [(0, 0), (0, 3), (4, 0), (4, 3)], strict=True):
        torch.testing.assert_close(whole[i : i + 4, j : j + 3], part, rtol=1e-10, atol=1e-12)


def test_matrices_along_the_diagonal_of_a_longer_side() -> None:
    """Of a 7 x 5 block at 3: rows 0-1, 2-3, 4-6 and columns 0-1, 2-4, each over the whole other side (dense numpy)."""
    torch.manual_seed(0)
    gradients = torch.randn(3, 7, 5, dtype=torch.float64)
    parameter = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))
    optimizer = Shampoo(
        [parameter],
        lr=1.0,
        betas=(0.0, 1.0),
        grafting=None,
        max_factor_dim=3,
        precondition_frequency=1,
        start_preconditioning_step=1,
        refresh_delay=0,
        exponent_override="2k",
    )
    expected, sums = np.zeros((7, 5)), [np.zeros((7, 7)), np.zeros((5, 5))]
    kept = [np.kron(np.eye(3), np.ones((3, 3)))[[0, 1, 3, 4, 6, 7, 8]][:, [0, 1, 3, 4, 6, 7, 8]], np.zeros((5, 5))]
    kept[1][:2, :2] = kept[1][2:, 2:] = 1.0
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.numpy()
        sums[0] += kept[0] * (g @ g.T)
        sums[1] += kept[1] * (g.T @ g)
        roots = [_root(a, mask) for a, mask in zip(sums, kept, strict=True)]
        expected -= roots[0] @ g @ roots[1]
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-9)


def _root(matrix: Any, mask: Any) -> Any:
    """``(A + ridge)^(-1/4)``, the ridge relative to the largest eigenvalue of each part of the diagonal."""
    ridges = [1e-6 * np.linalg.eigvalsh(matrix[np.ix_(part, part)])[-1] for part in map(np.flatnonzero, mask)]
    values, vectors = np.linalg.eigh(matrix + np.diag(ridges))
    return vectors * values**-0.25 @ vectors.T


def test_nothing_to_precondition_is_an_error_with_the_table() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    with pytest.raises(ValueError, match="1-D"):
        Shampoo([parameter]).step()


def test_a_model_that_is_attached_late_says_what_an_embedding_is() -> None:
    """Without it both sides of a table have a preconditioner; a block that becomes another begins anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 4, bias=False))
    options: dict[str, Any] = {"workers": "inline", "precondition_frequency": 4, "refresh_delay": 3}
    optimizer = Shampoo(net.named_parameters(), **options)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            net(torch.arange(12)).square().mean().backward()
            optimizer.step()

    def dims() -> list[tuple[int, ...]]:
        return [block.block.dims for member in optimizer._members for block in member.blocks]

    steps(5)  # refreshes are in flight
    kept = optimizer._members[1].blocks[0]
    assert dims() == [(0, 1), (0, 1)]
    optimizer.attach(net)
    steps(9)
    assert dims() == [(1,), (0, 1)] and optimizer._members[1].blocks[0] is kept
    assert all(block.ready for member in optimizer._members for block in member.blocks)
    Shampoo(net, **options).load_state_dict(optimizer.state_dict())
