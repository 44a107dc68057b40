"""``compute_dtype="auto"``: bfloat16 where it is much faster, on every rank, for blocks that are large enough."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_soo import Shampoo
from lightning_soo.linalg import product_rates
from lightning_soo.linalg.product_rates import bfloat16_gain
from lightning_soo.optim import plannable


def roots(monkeypatch: pytest.MonkeyPatch, gain: float, dtype: torch.dtype, **options: object) -> list[torch.dtype]:
    """Dtypes of the roots of a 256 x 256 and of a 16 x 256 block after the first refresh."""
    monkeypatch.setattr(plannable, "bfloat16_gain", lambda device: gain)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh(), nn.Linear(256, 16, bias=False)).to(dtype)
    optimizer = Shampoo(net, workers="inline", start_preconditioning_step=1, **options)
    net(torch.randn(4, 256, dtype=dtype)).square().mean().backward()
    optimizer.step()
    found = [member.blocks[0].roots for member in optimizer._members]
    assert all(block is not None and len(block) == 2 for block in found)
    assert optimizer.state_bytes() == optimizer.attach().state_bytes[0]
    return [block[0].dtype for block in found if block]


@pytest.mark.parametrize(
    ("gain", "dtype", "options", "expected"),
    [
        (4.0, torch.float32, {}, [torch.bfloat16, torch.float32]),  # the default; the second block is too small
        (1.2, torch.float32, {}, [torch.float32, torch.float32]),
        (4.0, torch.bfloat16, {}, [torch.bfloat16, torch.float32]),
        (4.0, torch.float64, {}, [torch.float64, torch.float64]),
        (4.0, torch.float32, {"compute_dtype": None}, [torch.float32, torch.float32]),
        (0.1, torch.float32, {"compute_dtype": "bfloat16"}, [torch.bfloat16, torch.bfloat16]),
    ],
)
def test_dtype_of_roots(
    monkeypatch: pytest.MonkeyPatch,
    gain: float,
    dtype: torch.dtype,
    options: dict[str, object],
    expected: list[torch.dtype],
) -> None:
    assert roots(monkeypatch, gain, dtype, **options) == expected


def test_rates_are_measured_once_and_draw_no_random_numbers() -> None:
    bfloat16_gain.cache_clear()
    before = torch.random.get_rng_state()
    assert 0.0 < bfloat16_gain("cpu") == bfloat16_gain("cpu") < 1e3
    assert bfloat16_gain.cache_info().misses == 1
    assert torch.equal(before, torch.random.get_rng_state())


def test_another_dtype_after_a_checkpoint_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stepped(gain: float) -> Shampoo:
        monkeypatch.setattr(plannable, "bfloat16_gain", lambda device: gain)
        net = nn.Linear(256, 256, bias=False)
        optimizer = Shampoo(net, workers="inline", start_preconditioning_step=1)
        net(torch.ones(2, 256)).sum().backward()
        optimizer.step()
        return optimizer

    saved = stepped(4.0).state_dict()
    stepped(4.0).load_state_dict(saved)
    assert not caplog.text
    stepped(1.0).load_state_dict(saved)
    assert "roots of 1 blocks were bfloat16 in the checkpoint and are float32 here: set compute_dtype" in caplog.text


def test_without_such_products_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks would wait for this one's answer."""

    def failing(matrix: torch.Tensor) -> float:
        raise RuntimeError("not implemented for 'BFloat16'")

    bfloat16_gain.cache_clear()
    monkeypatch.setattr(product_rates, "_seconds", failing)
    assert bfloat16_gain("cpu") == 0.0
    bfloat16_gain.cache_clear()


def test_roots_that_a_dtype_cannot_hold_fail_and_nothing_breaks(caplog: pytest.LogCaptureFixture) -> None:
    """Gradients of 1e-5 give roots above 65,504: the graft goes on alone."""
    parameters = [nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.0}
    shampoo = Shampoo([("weight", parameters[0])], **settings, workers="inline", compute_dtype="float16")
    optimizers = [shampoo, torch.optim.AdamW([parameters[1]], **settings)]
    left = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for step in range(7):
        right = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.grad = 1e-5 * left @ right
            optimizer.step()
    torch.testing.assert_close(parameters[0], parameters[1])
    assert "too large for float16: choose another compute_dtype" in caplog.text
