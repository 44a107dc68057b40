"""The callback in a Trainer of two processes: against a plain loop that does what DDP does, and resumed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from launching import torchrun
from torch import nn
from torch.utils.data import DataLoader

from lightning_soo import Shampoo

sys.path.insert(0, str(Path(__file__).parent))
import worker_trainer
from worker_trainer import BATCH, COMBINATIONS, EPOCHS, OPTIONS, RANKS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks wrote; they are started once."""
    out = tmp_path_factory.mktemp("world")
    torchrun(worker_trainer.__file__, RANKS, out)
    return out


def test_the_combinations_are_pairwise() -> None:
    assert worker_trainer.pairwise()


@pytest.mark.parametrize(("precision", "clip", "scheduler", "accumulate"), COMBINATIONS)
def test_two_processes_equal_a_plain_loop(
    world: Path, precision: str, clip: float | None, scheduler: bool, accumulate: int
) -> None:
    """The mean of the ranks' gradients, one after the other in one process."""
    net = worker_trainer.make_net()
    optimizer = Shampoo(net, lr=0.02, weight_decay=0.1, **OPTIONS)
    decay = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    x, y = worker_trainer.make_data().tensors
    batches = len(x) // (BATCH * RANKS)
    for _ in range(EPOCHS):
        for index in range(batches):
            for rank in range(RANKS):
                rows = slice(index * BATCH * RANKS + rank, (index + 1) * BATCH * RANKS, RANKS)
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                    loss = nn.functional.mse_loss(net(x[rows]), y[rows])
                (loss / (accumulate * RANKS)).backward()
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                if scheduler:
                    decay.step()
    for rank in range(RANKS):
        results = torch.load(world / f"combinations{rank}.pt", weights_only=True)
        found = results[f"{precision} {clip} {scheduler} {accumulate}"]
        for name, expected in net.state_dict().items():
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_two_processes_continues_in_one(world: Path) -> None:
    """One process with twice the batch: what the two ranks had together, with the same rows in every batch."""
    whole = torch.load(world / "whole.pt", weights_only=True)
    model = worker_trainer.Model(scheduler=True)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[worker_trainer.SecondOrder(**OPTIONS)],
    )
    loader = DataLoader(worker_trainer.make_data(), BATCH * RANKS)
    trainer.fit(model, loader, ckpt_path=world / "saved" / "epoch=0-step=8.ckpt")
    assert trainer.global_step == 4 * len(loader)
    for name, expected in model.net.state_dict().items():
        torch.testing.assert_close(whole[name], expected, rtol=1e-4, atol=1e-5)


def test_the_monitor_logged_equal_steps(world: Path) -> None:
    rows = list(csv.DictReader((world / "logs" / "version_0" / "metrics.csv").open()))
    logged = [row for row in rows if row["second_order/condition_number"]]
    assert [int(row["step"]) for row in logged] == list(range(4, 17, 2))
    assert all(0 <= float(row["second_order/root_residual"]) < 1e-3 for row in logged)
    assert {float(row["lr-Shampoo"]) for row in rows if row["lr-Shampoo"]} == {0.02, 0.01, 0.005, 0.0025}
