"""DDP of 1, 2 and 3 ranks against one process, in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launching import torchrun

sys.path.insert(0, str(Path(__file__).parent))
import worker_ddp


def one_process() -> list[torch.Tensor]:
    model = worker_ddp.make_model()
    optimizer = worker_ddp.make_optimizer(model, workers="inline")
    worker_ddp.train(model, optimizer, 0, 1, 0, worker_ddp.STEPS)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ddp_equals_one_process(ranks: int, tmp_path: Path) -> None:
    torchrun(worker_ddp.__file__, ranks, tmp_path)
    expected = one_process()
    for rank in range(ranks):
        for a, b in zip(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), expected, strict=True):
            assert (a - b).abs().max() <= 1e-9
    # saved at any number of ranks, continued in one process
    half = torch.load(tmp_path / "half.pt", weights_only=True)
    model = worker_ddp.make_model()
    model.load_state_dict(half["model"])
    optimizer = worker_ddp.make_optimizer(model, workers="inline")
    optimizer.load_state_dict(half["optimizer"])
    worker_ddp.train(model, optimizer, 0, 1, 11, worker_ddp.STEPS)
    for a, b in zip(model.parameters(), expected, strict=True):
        assert (a - b).abs().max() <= 1e-9
