"""K-FAC trains real architectures, wrapped and adapted as users do; what it does not cover it names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

sys.path.insert(0, str(Path(__file__).parent))
from test_capture_models import bert, encoder, encoder_sequence_first, gpt2, vit

from lightning_soo import KFAC

SETTINGS: dict[str, Any] = {
    "lr": 0.02,
    "damping": 1e-2,
    "statistics_frequency": 1,
    "precondition_frequency": 2,
    "workers": "inline",
}


def losses(model: nn.Module, inputs: Any, optimizer: KFAC, steps: int = 8) -> list[float]:
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        loss = output["loss"] if not isinstance(output, Tensor) else output.square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("damping_method", ["exact", "pi"])
@pytest.mark.parametrize("make", [bert, gpt2, vit, encoder, encoder_sequence_first])
def test_transformers_train(make: Callable[[], tuple[nn.Module, dict[str, Tensor]]], damping_method: str) -> None:
    if make in (bert, gpt2, vit):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = make()
    model.train()
    optimizer = KFAC(model, **SETTINGS, damping_method=damping_method)
    found = losses(model, inputs, optimizer)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert min(found[-2:]) < found[0]
    plan = optimizer.attach()
    assert plan.preconditioned_share > 0.95
    seen = [block for member in optimizer._members for block in member.blocks if block.ready]
    assert len(seen) > 0.8 * len(plan.units)


class Adapted(nn.Module):
    """LoRA: a frozen layer and two small ones beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.base.requires_grad_(False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def test_low_rank_adapters_and_normed_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Tanh(), Adapted(), nn.Tanh(), nn.Linear(8, 3))
    before = model[2].base.weight.clone()  # type: ignore[union-attr, operator]
    optimizer = KFAC(model, **SETTINGS)
    found = losses(model, torch.randn(16, 8), optimizer, steps=12)
    assert found[-1] < found[0]
    assert torch.equal(model[2].base.weight, before)  # type: ignore[union-attr, arg-type]
    table = {line.split()[0]: line for line in optimizer.plan_table().splitlines() if line}
    assert "kfac" in table["2.down.weight"] and "kfac" in table["2.up.weight"]
    normed = [line for name, line in table.items() if name.startswith("0.parametrizations")]
    assert normed and all("sgd" in line for line in normed)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_model_takes_the_same_steps(compiled_first: bool) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
        run: Any = torch.compile(model, backend="eager") if compiled and compiled_first else model
        if compiled and compiled_first:
            run(x)
        optimizer = KFAC(run, **SETTINGS)
        if compiled and not compiled_first:
            run = torch.compile(model, backend="eager")
        for _ in range(6):
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(x), y).backward()
            optimizer.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
        assert all(block.observations == 6 for member in optimizer._members for block in member.blocks)
    for eager, compiled_one in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled_one)


def test_unfreezing_and_adding_groups_goes_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    optimizer = KFAC([{"params": [p for p in model[:3].parameters()]}], **SETTINGS)
    optimizer.attach(model)
    x = torch.randn(16, 8)
    losses(model, x, optimizer, steps=4)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.01})
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = losses(model, x, optimizer, steps=6)
    assert found[-1] < found[0]
    plan = optimizer.attach()
    assert {unit.block.parameter for unit in plan.units} == {"0.weight", "2.weight", "4.weight"}
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    counts = {block.block.parameter: block.observations for m in optimizer._members for block in m.blocks}
    assert counts["2.weight"] >= 9 and counts["0.weight"] >= 5 and counts["4.weight"] >= 5
