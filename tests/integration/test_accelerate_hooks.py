"""Hooks that users register for Accelerate's states see what they see without us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from lightning_soo.integrations.accelerate import prepare


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_load_hook_may_take_the_models_away(tmp_path: Path, when: str) -> None:
    """As scripts do that write and read adapters themselves."""
    accelerator, seen = Accelerator(cpu=True), list[Any]()

    def hook(models: list[Any], folder: str) -> None:
        while models:
            seen.append(accelerator.unwrap_model(models.pop()))

    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    if when == "before":
        accelerator.register_load_state_pre_hook(hook)
    model, optimizer = prepare(accelerator, net, torch.optim.AdamW(net.parameters(), lr=0.1), config="shampoo")
    if when == "after":
        accelerator.register_load_state_pre_hook(hook)
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(5, 4)).square().mean())
        optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    kept = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.zero_()
    accelerator.load_state(str(tmp_path / "state"))
    assert seen == [net] and torch.equal(net.weight, kept)
    optimizer.optimizer.close()
