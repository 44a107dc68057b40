"""Worker processes inside a real Trainer: nothing is left behind, however fit ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder

WORKERS = {"kind": "process", "count": 2}


class Model(L.LightningModule):
    def __init__(self, ending: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.ending = nn.Linear(20, 20), ending

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.ending and batch_idx == 6:
            assert len(worker_processes(os.getpid())) == 2
            assert self.trainer.optimizers[0].diagnostics()["refreshes_in_flight"] > 0  # type: ignore[attr-defined]
            if self.ending == "exception":
                raise RuntimeError("the user's own")
            os.kill(os.getpid(), {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}[self.ending])
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def worker_processes(parent: int) -> list[int]:
    """Live children of a process that run the worker's program."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            command = (entry / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if int(fields[1]) == parent and fields[0] not in "ZX" and b"refresh/worker.py" in command:
            found.append(int(entry.name))
    return found


def leftovers() -> list[str]:
    """What our workers would leave in this process."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(entry))
        except OSError:
            continue
    return [name for name in names if "memfd:lightning_soo" in name]


def fit(tmp_path: Path, model: Model, callbacks: tuple[L.Callback, ...] = (), **options: Any) -> L.Trainer:
    x = torch.randn(80, 20, generator=torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        },
        callbacks=[
            *callbacks,
            SecondOrder(precondition_frequency=2, start_preconditioning_step=1, workers=WORKERS),
            PreconditionerMonitor(2),
        ],
    )
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=4, num_workers=1))
    return trainer


@pytest.mark.parametrize("ending", ["", "exception", "interrupt"])
def test_nothing_is_left_behind(tmp_path: Path, ending: str) -> None:
    model = Model(ending)
    try:
        fit(tmp_path, model)
    except RuntimeError as error:
        assert ending == "exception" and "own" in str(error)
    except (KeyboardInterrupt, SystemExit):
        assert ending == "interrupt"
    else:
        assert not ending
    assert worker_processes(os.getpid()) == []
    assert leftovers() == []
    assert "configure_optimizers" not in model.__dict__


def test_sigterm_saves_through_the_trainer_and_stops_the_workers(tmp_path: Path) -> None:
    """As a cluster does: the checkpoint continues where the run was ended."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_workers_in_trainer as t
from lightning.pytorch.callbacks import OnExceptionCheckpoint
t.fit(Path({str(tmp_path)!r}), t.Model("terminate"), enable_checkpointing=True,
      callbacks=(OnExceptionCheckpoint({str(tmp_path)!r}),))
"""
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    _, text = run.communicate(timeout=120)
    saved = list(tmp_path.glob("*.ckpt"))
    assert len(saved) == 1, text[-3000:]
    checkpoint = torch.load(saved[0], weights_only=True)
    assert checkpoint["optimizer_states"][0]["second_order"]["steps"] == checkpoint["global_step"] == 7
    end = time.monotonic() + 5
    while worker_processes(run.pid):
        assert time.monotonic() < end
    model = Model()
    x = torch.randn(80, 20)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[SecondOrder(precondition_frequency=2, start_preconditioning_step=1)],
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(x), batch_size=4), ckpt_path=saved[0])
    assert trainer.optimizers[0].steps > 7  # type: ignore[attr-defined]
