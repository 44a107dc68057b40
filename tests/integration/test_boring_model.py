"""Lightning's own BoringModel in a script of three lines, opted in by a variable, in two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from launching import TESTS
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import nn
from torch.utils.data import DistributedSampler

from lightning_soo.optim.takeover import take_over

OPTIONS = {"precondition_frequency": 2, "start_preconditioning_step": 2, "preconditioner_eps": 1e-3}
SCRIPT = """
import lightning as L, torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

L.seed_everything(0)
data, model = DataLoader(RandomDataset(32, 12)), BoringModel()
trainer = L.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", limit_val_batches=0, logger=False)
trainer.fit(model, data)
if trainer.is_global_zero:
    torch.save(model.state_dict(), "boring.pt")
"""


def plain_loop() -> dict[str, torch.Tensor]:
    """One process with the batches of both; SGD and StepLR are the model's own."""
    L.seed_everything(0)
    data, model = RandomDataset(32, 12).data, BoringModel()
    (optimizer,), (schedule,) = model.configure_optimizers()
    take_over(optimizer, "shampoo", OPTIONS, model)
    sampler = DistributedSampler(data, 1, 0)  # which the Trainer gives every rank its part of
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, 12, 2):
            optimizer.zero_grad()
            output = model(data[order[start : start + 2]])
            nn.functional.mse_loss(output, torch.ones_like(output)).backward()
            optimizer.step()
        schedule.step()
    return model.state_dict()


def test_the_boring_model(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    line = ",".join(["method=shampoo", *(f"{name}={value}" for name, value in OPTIONS.items())])
    run = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        env={
            **{name: value for name, value in os.environ.items() if name != "MASTER_PORT"},
            **{"OMP_NUM_THREADS": "1", "PYTHONPATH": TESTS, "SOO_LIGHTNING": line},
        },
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (table,) = [row for row in (run.stdout + run.stderr).splitlines() if row.startswith("layer.weight")]
    assert table.split()[2:4] == ["ddp", "shampoo"]
    found = torch.load(tmp_path / "boring.pt", weights_only=True)
    torch.testing.assert_close(found, plain_loop(), rtol=1e-5, atol=1e-6)
