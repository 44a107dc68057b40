"""What gradients have in common, and the exponent that follows from it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_soo import Shampoo
from lightning_soo.linalg.norms import inner_product
from lightning_soo.preconditioners.signal import GradientSignal

OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "betas": (0.9, 0.99),
    "precondition_frequency": 1,
    "refresh_delay": 0,
    "workers": "inline",
    "compute_dtype": None,
}


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 3.0])
def test_share_of_a_known_mixture(ratio: float) -> None:
    """Gradients ``S + N`` have the share ``|S|^2 / (|S|^2 + E |N|^2)``; the mean of a few hundred is near it."""
    generator = np.random.default_rng(0)
    count, decay = 400, 0.9
    signal = generator.standard_normal(count)
    signal *= np.sqrt(ratio * count) / np.linalg.norm(signal)
    shares, estimate, mean = [], GradientSignal(), np.zeros(count)
    for step in range(400):
        gradient = signal + generator.standard_normal(count)
        if step:
            estimate.observe(float(mean @ gradient) / (1 - decay**step), float(gradient @ gradient))
        mean = decay * mean + (1 - decay) * gradient
        if step >= 50:
            shares.append(estimate.share)
    assert np.mean(shares) == pytest.approx(ratio / (1 + ratio), abs=0.02)


@pytest.mark.parametrize("shape", [(6, 5), (5, 4, 3)])
@pytest.mark.parametrize("agree", [True, False])
def test_exponent_at_both_ends(shape: tuple[int, ...], agree: bool) -> None:
    """The direction is that of 2k where all gradients are one, of (k + 3) / 2 where each is opposed to the last one."""
    k = len(shape)
    directions = [direction_after(shape, agree, exponent) for exponent in (None, 2.0 * k, (k + 3.0) / 2.0)]
    nearest = torch.tensor([float((directions[0] - one).norm() / one.norm()) for one in directions[1:]])
    assert nearest.argmin() == (0 if agree else 1) and nearest.min() < 1e-9 and nearest.max() > 1e-3


def direction_after(shape: tuple[int, ...], agree: bool, exponent: float | None) -> Tensor:
    """What the last of ten steps adds."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Shampoo([parameter], **OPTIONS, merge_dims="none", exponent_override=exponent)
    for step in range(10):
        before = parameter.detach().clone()
        parameter.grad = first.clone() if agree else (first + 0.1 * second) * (-1.0) ** step + 0.01 * step * second
        optimizer.step()
    optimizer.close()
    return parameter.detach() - before


def test_papers_exponent_while_nothing_is_known() -> None:
    """Without a running mean, and in the first step, there is nothing to compare with."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for exponent in (None, "2k"):
        generator.manual_seed(0)
        parameter = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        options = {**OPTIONS, "betas": (0.0, 0.99), "grafting": "sgd", "exponent_override": exponent}
        optimizer = Shampoo([parameter], **options)
        for _ in range(5):
            parameter.grad = torch.randn(6, 5, generator=generator, dtype=torch.float64)
            optimizer.step()
        optimizer.close()
        found.append(parameter.detach())
    assert torch.equal(*found)


def test_a_resumed_run_knows_it() -> None:
    """The estimate is part of the state: without it the first refreshes after loading would have another exponent."""

    def gradient(step: int) -> Tensor:
        return torch.randn(6, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

    def run(optimizer: Shampoo, parameter: torch.nn.Parameter, steps: range) -> None:
        for step in steps:
            parameter.grad = gradient(step)
            optimizer.step()

    one = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    optimizer = Shampoo([("one", one)], **OPTIONS)
    run(optimizer, one, range(6))
    saved, values = copy.deepcopy(optimizer.state_dict()), one.detach().clone()
    run(optimizer, one, range(6, 9))
    other = torch.nn.Parameter(values)
    resumed = Shampoo([("one", other)], **OPTIONS)
    resumed.load_state_dict(saved)
    run(resumed, other, range(6, 9))
    assert torch.equal(one, other)
    assert 0.0 <= resumed.diagnostics()["signal_share"] < 0.5  # noise
    for each in (optimizer, resumed):
        each.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-20])
@pytest.mark.parametrize("shape", [(0,), (37,), (4, 3, 5, 2)])
def test_inner_product(shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = ((torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(2))
    expected = float((first.double() * second.double()).sum())
    assert float(inner_product(first, second)) == pytest.approx(expected, rel=1e-5, abs=0.0)
    if len(shape) == 4:
        last = [tensor.to(memory_format=torch.channels_last) for tensor in (first, second)]
        assert float(inner_product(*last)) == pytest.approx(expected, rel=1e-5, abs=0.0)
