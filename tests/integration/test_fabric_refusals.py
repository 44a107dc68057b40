"""``fabric.load`` of what cannot be loaded: refused by name, with model and optimizer as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn

import lightning_soo
from lightning_soo.strategies.fabric import FabricSecondOrderDDPStrategy


@pytest.fixture(scope="module")
def fabric() -> Iterator[Fabric]:
    with mock.patch.dict(os.environ):  # where a launch leaves an address
        found = Fabric(accelerator="cpu", devices=1, strategy=FabricSecondOrderDDPStrategy(method=None))
        found.launch()
        yield found
        dist.destroy_process_group()


def build(fabric: Fabric, seed: int, kind: Any = lightning_soo.Shampoo) -> dict[str, Any]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = kind(module.parameters(), lr=0.1)
    model, optimizer = fabric.setup(module, optimizer)
    for step in range(3):
        model(torch.randn(4, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def test_a_file_is_checked_before_anything_is_loaded(fabric: Fabric, tmp_path: Path) -> None:
    fabric.save(tmp_path / "good.ckpt", build(fabric, 0))
    fabric.save(tmp_path / "adamw.ckpt", build(fabric, 0, torch.optim.AdamW))
    shutil.copy(tmp_path / "good.ckpt", tmp_path / "bad.ckpt")
    data = bytearray((tmp_path / "bad.ckpt").read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 300):
        data[place] ^= 1
    (tmp_path / "bad.ckpt").write_bytes(data)
    state = build(fabric, 1)
    before = {name: value.clone() for name, value in state["model"].state_dict().items()}
    for name, match in (("bad.ckpt", "damaged"), ("adamw.ckpt", "another optimizer")):
        with pytest.raises(lightning_soo.CheckpointError, match=match):
            fabric.load(tmp_path / name, state)
        assert all(torch.equal(before[name], value) for name, value in state["model"].state_dict().items())
    fabric.load(tmp_path / "good.ckpt", state)
    other = build(fabric, 0)
    for mine, expected in zip(state["model"].parameters(), other["model"].parameters(), strict=True):
        assert torch.equal(mine, expected)
