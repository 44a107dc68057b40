"""SOAP against an independent implementation's trajectories, AdamW, and eigenvectors that any run agrees on."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_soo import SOAP
from lightning_soo.linalg.eigenbases import eigenbasis
from lightning_soo.preconditioners.eigenbasis import orthogonal_iteration

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))
import problem  # noqa: E402


@pytest.mark.parametrize("workers", ["inline", "thread"])
@pytest.mark.parametrize(("name", "full_rank"), [("mlp", (0, 2)), ("replay", (0,))])
def test_golden_trajectory(name: str, full_rank: tuple[int, ...], workers: str) -> None:
    """Parameters follow the reference one step at a time: the rank-deficient ones are not unique there."""
    initial, gradients = problem.PROBLEMS[name]
    reference = [np.load(GOLDEN / "shampoo.npz")[f"{name}/soap_eigh/p{index}"] for index in range(len(initial()))]
    parameters = [nn.Parameter(torch.from_numpy(np.array(value))) for value in initial()]
    optimizer = SOAP(
        parameters,
        lr=0.02,
        betas=(0.9, 0.99),
        eps=1e-8,
        precondition_frequency=3,
        refresh_delay=0,
        stagger=False,
        max_preconditioner_dim=8,
        merge_dims="all",
        precondition_1d=True,
        workers=workers,
    )
    for step in range(problem.STEPS):
        for parameter, values in zip(parameters, reference, strict=True):
            parameter.data.copy_(torch.from_numpy(values[step]))
        values = [values[step] for values in reference]
        for parameter, gradient in zip(parameters, gradients(values, step), strict=True):
            parameter.grad = torch.from_numpy(np.ascontiguousarray(gradient))
        optimizer.step()
        for index in full_rank:
            found, movement = (
                parameters[index].detach().numpy(),
                np.abs(reference[index][-1] - reference[index][0]).max(),
            )
            assert np.abs(found - reference[index][step + 1]).max() <= 1e-5 * movement, (step, index)
    optimizer.close()


def train(optimizer: torch.optim.Optimizer, net: nn.Module, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (net(x) - x[:, :4].sin()).square().mean().backward()
        optimizer.step()


def test_with_the_identity_as_basis_it_is_adamw() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    other = copy.deepcopy(net)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    train(SOAP(net, start_preconditioning_step=1000, **settings), net, 30)
    train(torch.optim.AdamW(other.parameters(), **settings), other, 30)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_qr_steps_lead_to_the_eigenvectors() -> None:
    """Of a fixed statistic with well separated eigenvalues, whatever they begin with."""
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    matrix = vectors @ torch.diag(2.0 ** torch.arange(12, dtype=torch.float64)) @ vectors.T
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        basis = torch.eye(12, dtype=dtype)
        for _ in range(60):
            basis = orthogonal_iteration(matrix.to(dtype), basis)
        torch.testing.assert_close(basis.T @ basis, torch.eye(12, dtype=dtype), rtol=0, atol=1e-5)
        # the largest half: the ridge hides what is far below the largest eigenvalue
        overlap = (basis.double().T @ vectors).abs()[:, 6:].amax(0)
        assert float((1 - overlap).max()) < bound


@pytest.mark.parametrize("factor", [1.0, 1e30, 1e-30])
def test_a_qr_step_leaves_the_null_space_alone(factor: float) -> None:
    """And is the same after another order of summation, up to the ridge."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    matrix = gradients @ gradients.T * factor
    basis = torch.from_numpy(eigenbasis(matrix.numpy(), tolerance=1e-12)[0])
    after = orthogonal_iteration(matrix, basis)
    torch.testing.assert_close(after, basis, rtol=0, atol=1e-9)
    noise = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    other = orthogonal_iteration(matrix + (noise + noise.T) * 1e-16 * matrix.abs().max(), basis)
    torch.testing.assert_close(other, after, rtol=0, atol=1e-9)


def test_qr_bases_train_like_whole_decompositions() -> None:
    """Another basis in small eigenvalues, hence not the same trajectory, but the same progress; and nothing waits."""
    losses = {}
    for basis in ("eigh", "qr"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        optimizer = SOAP(net, lr=0.02, precondition_frequency=5, refresh_delay=0, basis=basis, workers="inline")
        train(optimizer, net, 120)
        x = torch.randn(256, 6, generator=torch.Generator().manual_seed(999), dtype=torch.float64)
        losses[basis] = float((net(x) - x[:, :4].sin()).square().mean().detach())
    assert losses["qr"] < 1.3 * losses["eigh"] and losses["qr"] != losses["eigh"]


@pytest.mark.parametrize("basis", ["eigh", "qr"])
def test_a_saved_run_goes_on_bit_for_bit(basis: str) -> None:
    def make() -> tuple[nn.Module, SOAP]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        return net, SOAP(net, lr=0.01, precondition_frequency=4, refresh_delay=3, basis=basis, workers="thread")

    whole, optimizer = make()
    train(optimizer, whole, 17)
    saved = copy.deepcopy({"net": whole.state_dict(), "optimizer": optimizer.state_dict()})
    train(optimizer, whole, 9)
    resumed, again = make()
    resumed.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, 9)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert basis == "qr" or optimizer.diagnostics()["condition_number"] > 1


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_a_degenerate_basis_does_not_depend_on_rounding(rank: int) -> None:
    """The null space and a repeated eigenvalue, with the matrix's elements disturbed by rounding."""
    generator = np.random.default_rng(rank)
    factor = generator.standard_normal((12, rank))
    matrix = factor @ factor.T
    if rank == 11:
        basis = np.linalg.qr(generator.standard_normal((12, 12)))[0]
        matrix = basis @ np.diag([1.0] * 5 + [2.0] * 6 + [3.0]) @ basis.T
    disturbed = matrix * (1 + 1e-15 * generator.standard_normal((12, 12)))
    first, _ = eigenbasis(matrix, tolerance=1e-12)
    second, _ = eigenbasis((disturbed + disturbed.T) / 2, tolerance=1e-12)
    alignment = np.abs(first.T @ second)
    assert np.abs(alignment - np.eye(12)).max() < 1e-6
    plain = np.abs(np.linalg.eigh(matrix)[1].T @ np.linalg.eigh((disturbed + disturbed.T) / 2)[1])
    assert rank == 1 or np.abs(plain - np.eye(12)).max() > 1e-3  # without it they do differ
    values = np.diag(first.T @ matrix @ first)
    assert np.abs(first @ np.diag(values) @ first.T - matrix).max() < 1e-9 * np.abs(matrix).max()
    assert np.abs(first.T @ first - np.eye(12)).max() < 1e-12


def test_it_beats_adamw_where_curvature_is_not_along_axes() -> None:
    """A badly conditioned quadratic in rotated coordinates, each with its best of a few learning rates."""
    generator = torch.Generator().manual_seed(0)
    rotate = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0]
    curvature = rotate @ torch.diag(torch.logspace(0, 4, 20, dtype=torch.float64)) @ rotate.T
    start = torch.randn(20, 20, generator=generator, dtype=torch.float64)

    def loss_after(make: type[torch.optim.Optimizer], lr: float, **options: object) -> float:
        x = nn.Parameter(start.clone())
        optimizer = make([x], lr=lr, **options)  # type: ignore[call-arg]
        for _ in range(150):
            optimizer.zero_grad()
            loss = 0.5 * (x * (curvature @ x)).sum()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    rates = (0.01, 0.03, 0.1, 0.3)
    options = {"precondition_frequency": 5, "refresh_delay": 0, "betas": (0.9, 0.95)}
    soap = min(loss_after(SOAP, lr, **options) for lr in rates)
    adamw = min(loss_after(torch.optim.AdamW, lr, betas=(0.9, 0.95), weight_decay=0.0) for lr in rates)
    assert soap < 0.5 * adamw


def test_a_rollback_to_before_the_first_gradient_is_a_fresh_start() -> None:
    def run(rolled_back: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(6, 4).double()
        optimizer = SOAP(net, lr=0.01, precondition_frequency=4)
        optimizer.attach()
        start = copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
        if rolled_back:
            train(optimizer, net, 9)
            net.load_state_dict(start["net"])
            optimizer.load_state_dict(start["optimizer"])
        train(optimizer, net, 9)
        return list(net.parameters())

    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other)
