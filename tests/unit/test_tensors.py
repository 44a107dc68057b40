"""Parameters of every order, size and dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_soo import Shampoo


def gradients(shape: tuple[int, ...], steps: int = 8) -> torch.Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def train(parameters: list[nn.Parameter], steps: list[list[torch.Tensor]], **options: object) -> Shampoo:
    defaults = {"lr": 0.1, "precondition_frequency": 2, "start_preconditioning_step": 2, "refresh_delay": 0}
    optimizer = Shampoo(parameters, **{**defaults, "stagger": False, **options})
    for row in steps:
        for parameter, gradient in zip(parameters, row, strict=True):
            parameter.grad = gradient.to(parameter.dtype).clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("exponent", [2.5, "2k"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (3, 2, 2, 2), (2, 3, 2, 2, 2)])
def test_any_order_against_einsum(shape: tuple[int, ...], exponent: float | str) -> None:
    """Every mode of the tensor has its own root: the direction of the last step, by numpy, mode by mode."""
    steps = gradients(shape, 4)
    parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    options = {"merge_dims": "none", "grafting": None, "betas": (0.0, 0.9), "lr": 1.0, "precondition_frequency": 1}
    options["exponent_override"] = exponent
    p = 2 * len(shape) if exponent == "2k" else exponent
    before = torch.zeros(shape, dtype=torch.float64)
    optimizer = train([parameter], [[g] for g in steps[:-1]], **options, start_preconditioning_step=1)
    before.copy_(parameter.detach())
    parameter.grad = steps[-1].clone()
    optimizer.step()
    expected = steps[-1].numpy()
    for mode in range(len(shape)):
        unfolded = [np.moveaxis(g.numpy(), mode, 0).reshape(shape[mode], -1) for g in steps]
        total = sum(0.1 * 0.9 ** (len(steps) - 1 - s) * u @ u.T for s, u in enumerate(unfolded))
        statistic = total / (1 - 0.9 ** len(steps))
        values, vectors = np.linalg.eigh(statistic)
        root = (vectors * (values + 1e-6 * values[-1]) ** (-1 / p)) @ vectors.T
        expected = np.moveaxis(np.tensordot(root, expected, (1, mode)), 0, mode)
    found = (before - parameter.detach()).numpy()
    assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()


def test_vectors_are_preconditioned_on_request() -> None:
    parameter = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = train([parameter], [[g] for g in gradients((5,))], precondition_1d=True)
    assert optimizer.attach().units[0].block.orders == (5,)


def test_very_tall_is_one_sided_with_a_square_root() -> None:
    """``G R^(-1/2)``, R the 3 x 3 statistic: against numpy."""
    steps = gradients((40, 3), 3)
    parameter = nn.Parameter(torch.zeros(40, 3, dtype=torch.float64))
    options = {"grafting": None, "betas": (0.0, 1.0), "lr": 1.0, "one_sided_above": 16, "max_preconditioner_dim": 64}
    train([parameter], [[g] for g in steps], **options, precondition_frequency=1, start_preconditioning_step=1)
    expected, statistic = np.zeros((40, 3)), np.zeros((3, 3))
    for gradient in steps.numpy():
        statistic += gradient.T @ gradient
        values, vectors = np.linalg.eigh(statistic)
        expected -= gradient @ ((vectors * (values + 1e-6 * values[-1]) ** -0.5) @ vectors.T)
    assert np.abs(parameter.detach().numpy() - expected).max() <= 1e-9


@pytest.mark.parametrize("compute", ["bfloat16", "float64"])
def test_compute_dtype_changes_only_rounding(compute: str) -> None:
    found = []
    for kind in (None, compute):
        parameter = nn.Parameter(torch.zeros(6, 5))
        train([parameter], [[g] for g in gradients((6, 5))], compute_dtype=kind, preconditioner_eps=1e-2)
        found.append(parameter.detach())
    assert (found[0] - found[1]).abs().max() <= (0.02 if compute == "bfloat16" else 1e-5) * found[0].abs().max()
