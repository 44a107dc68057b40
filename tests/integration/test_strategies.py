"""Every strategy with plain AdamW against a plain loop on the same global batches, and resumed; on gloo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import torchrun
from torch import nn
from torch.utils.data import DistributedSampler

sys.path.insert(0, str(Path(__file__).parent))
import worker_strategies
from worker_strategies import ADAMW, COMBINATIONS, EPOCHS, GLOBAL_BATCH, KFAC, ROWS, SHAMPOO, Model

from lightning_soo.optim.takeover import take_over

WORLDS = {"ddp": 2, "fsdp": 2, "fsdp2": 2, "zero2": 2}
if os.environ.get("SOO_TEST_ALL_ENGINES"):  # the same paths once more
    WORLDS |= {"hsdp": 4, "zero1": 2, "zero3": 2}


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """The engine and what its ranks wrote; they are started once."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp(request.param)
    torchrun(worker_strategies.__file__, WORLDS[request.param], request.param, out)
    ranks = range(WORLDS[request.param])
    return request.param, [torch.load(out / f"results{rank}.pt", weights_only=True) for rank in ranks]


def plain_loop(
    precision: str, clip: float | None, accumulate: int, *, shuffle: bool = True, method: str | None = None
) -> dict[str, torch.Tensor]:
    data = worker_strategies.make_data()
    x, y = data.tensors
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    if method is not None:
        take_over(optimizer, method, SHAMPOO if method == "shampoo" else KFAC, model)
    if method == "kfac":
        optimizer.accumulate(accumulate)  # type: ignore[attr-defined]
    for epoch in range(EPOCHS):
        sampler = DistributedSampler(data, 1, 0, shuffle=shuffle)  # the Trainer's, on one rank
        sampler.set_epoch(epoch)
        order = list(sampler)
        for index in range(ROWS // GLOBAL_BATCH):
            rows = order[index * GLOBAL_BATCH : (index + 1) * GLOBAL_BATCH]
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = model.loss((x[rows], y[rows]))
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(("precision", "clip", "accumulate"), COMBINATIONS)
def test_strategies_equal_a_plain_loop(
    world: tuple[str, list[Any]], precision: str, clip: float | None, accumulate: int
) -> None:
    expected = plain_loop(precision, clip, accumulate)
    for results in world[1]:
        found = results[f"{precision} {clip} {accumulate}"]
        tolerance = 2e-5 if precision == "32-true" else 0.05
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance, check_dtype=False)


def test_shampoo_equals_a_plain_loop(world: tuple[str, list[Any]]) -> None:
    expected = plain_loop("32-true", 0.1, 1, method="shampoo")
    for results in world[1]:
        torch.testing.assert_close(results["shampoo"], expected, rtol=1e-4, atol=1e-4)


def test_kfac_equals_a_plain_loop(world: tuple[str, list[Any]]) -> None:
    """Also in what its factors are: every front door says what losses were divided by."""
    expected = plain_loop("32-true", 0.1, 2, method="kfac")
    for results in world[1]:
        torch.testing.assert_close(results["kfac"], expected, rtol=1e-4, atol=1e-4)


def test_a_module_without_an_optimizer(world: tuple[str, list[Any]]) -> None:
    expected = plain_loop("32-true", None, 1)
    for results in world[1]:
        torch.testing.assert_close(results["bare"], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("run", ["32-true", "bf16-mixed", "shampoo", "kfac"])
def test_fabric_equals_a_plain_loop(world: tuple[str, list[Any]], run: str) -> None:
    method = run if run in ("shampoo", "kfac") else None
    expected = plain_loop("32-true" if method else run, 0.1, 1, shuffle=False, method=method)
    for results in world[1]:
        tolerance = {"32-true": 2e-5, "bf16-mixed": 0.05}.get(run, 1e-4)
        found = results["fabric"][run]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance, check_dtype=False)
