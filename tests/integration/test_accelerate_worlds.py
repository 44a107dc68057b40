"""``accelerator.load_state`` goes on from any other engine and number of processes, as if nothing had happened."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from launching import torchrun
from torch import nn

pytest.importorskip("deepspeed")
sys.path.insert(0, str(Path(__file__).parent))
from accelerate.state import AcceleratorState
from accelerate_script import ADAMW, CLIP
from accelerate_worlds import CONFIG, perform
from other_world import ACCUMULATE, MICRO_BATCH, ROWS, Model, make_rows

from lightning_soo.optim.takeover import take_over

EARLIER = ["earlier_format:ddp", "earlier_format:fsdp2", "first_order:ddp", "first_order:zero2"]
WORKER = Path(__file__).parent / "accelerate_worlds.py"
# processes, and what they do: the numbers are epochs, and names of checkpoints; single is this process
WORLDS: list[tuple[int, list[str]]] = [
    (0, ["single:0"]),
    (2, ["ddp:1:0", "fsdp2:2:1", "zero2:3:2", "refusals:ddp", "refusals:fsdp2", *EARLIER]),
    (3, ["zero3:4:3", "fsdp2:end:4"]),
    (0, ["single:last:4"]),
]


def plain_loop(epochs: int) -> dict[str, torch.Tensor]:
    """One process, without Accelerate."""
    model, (x, y) = Model(0), make_rows()
    optimizer = torch.optim.AdamW(model.groups(), **ADAMW)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.8)
    options = {name: value for name, value in CONFIG.items() if name != "method"}
    take_over(optimizer, CONFIG["method"], options, model)
    for _ in range(epochs):
        for index, start in enumerate(range(0, ROWS, MICRO_BATCH)):
            rows = slice(start, start + MICRO_BATCH)
            (nn.functional.mse_loss(model(x[rows]), y[rows]) / ACCUMULATE).backward()
            if (index + 1) % ACCUMULATE == 0:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}


def test_every_engine_goes_on_from_every_other(tmp_path: Path) -> None:
    for ranks, tasks in WORLDS:
        if ranks:
            torchrun(WORKER, ranks, tmp_path, *tasks)
        else:
            perform(tmp_path, tasks)
    AcceleratorState._reset_state(True)
    start = dict(Model(0).named_parameters())
    for name in ("0", "1", "2", "3", "4", "end", "last"):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        expected = plain_loop(found["epochs"])
        moved = max(float((value - start[key]).abs().max()) for key, value in expected.items())
        error = max(float((found["state"][key] - value).abs().max()) for key, value in expected.items())
        assert error <= 1e-5 * moved, f"{name}: {error / moved:.1e} of the movement"
        assert float(found["state"]["saved_by"]) == found["epochs"] - 1
    # moments are written once, and Accelerate's files of the weights are there
    assert not (tmp_path / "1" / "optimizer.bin").exists() and (tmp_path / "1" / "model.safetensors").is_file()
