"""K-FAC's adaptive damping under Accelerate: that of one process without it, step by step."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from accelerate_launching import LAUNCH, launch
from accelerate_script import ROWS, Net, make_data
from worker_damping import BATCH, KFAC, SGD

import lightning_soo
from lightning_soo.integrations.accelerate import evaluate_with

SMALL = ["--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", "--fsdp_min_num_params", "30"]
ENGINES = ["fsdp2", "fsdp1", "ddp"] if os.environ.get("SOO_TEST_ALL_ENGINES") else ["fsdp2"]


def plain_loop() -> tuple[dict[str, torch.Tensor], list[float]]:
    model = Net(0)
    optimizer = lightning_soo.KFAC(model, **SGD, **KFAC)
    data, history = make_data().tensors, []
    for start in [*range(0, ROWS, BATCH)] * 2:
        x, y = (tensor[start : start + BATCH] for tensor in data)
        optimizer.evaluate = lambda x=x, y=y: nn.functional.mse_loss(model(x), y)
        optimizer.evaluate().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(optimizer.damping)
    return model.state_dict(), history


@pytest.mark.parametrize("engine", ENGINES)
def test_the_damping_is_that_of_one_process(tmp_path: Path, engine: str) -> None:
    """Sharded, the loss is seen with parameters as they are tried, and the next pass with those that are kept."""
    worker = Path(__file__).parent / "worker_damping.py"
    config = json.dumps({"method": "kfac", **KFAC})
    options = SMALL if engine.startswith("fsdp") else []
    program = ["-m", "lightning_soo.launch", worker, tmp_path]
    run = launch(LAUNCH / f"{engine}_cpu.yaml", *program, options=options, SOO_CONFIG=config)
    assert run.returncode == 0, run.stderr[-4000:]
    parameters, history = plain_loop()
    assert len(set(history)) > 2  # it moves
    for rank in range(2):
        for found, dampings in torch.load(tmp_path / f"damping{rank}.pt", weights_only=True).values():
            assert dampings == pytest.approx(history, rel=1e-9)
            torch.testing.assert_close(found, parameters, rtol=1e-4, atol=1e-4)


def test_only_kfac_is_told() -> None:
    with pytest.raises(TypeError, match="SGD has no adaptive damping"):
        evaluate_with(torch.optim.SGD([nn.Parameter(torch.ones(2))]), lambda: torch.ones(()))
