"""A variable instead of a callback; and the package name pytorch_lightning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from launching import TESTS, run_bounded
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))
from plain_loop import BATCH, EPOCHS, assert_trained, make_data
from worker_trainer import OPTIONS, Model

from lightning_soo import Shampoo
from lightning_soo.callbacks import SecondOrder
from lightning_soo.strategies import SecondOrderDDPStrategy

HERE = Path(__file__).parent
LINE = ",".join(["method=shampoo", *(f"{name}={value}" for name, value in OPTIONS.items())])


def trainer(**options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", devices=1, max_epochs=EPOCHS, **{**quiet, **options})


def loader() -> DataLoader[Any]:
    return DataLoader(make_data(), BATCH)


def test_the_variable_is_a_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOO_CONFIG", "method=kfac")  # is not asked
    for value, kind in (("", "AdamW"), (LINE, "Shampoo"), (f"{LINE},monitor=2", "Shampoo")):
        monkeypatch.setenv("SOO_LIGHTNING", value)
        model, run = Model(scheduler=True), trainer()
        run.validate(model, loader(), verbose=False)
        assert not run.optimizers
        run.fit(model, loader())
        assert type(run.optimizers[0]).__name__ == kind
        if value:
            assert_trained(model.state_dict(), 1, **OPTIONS)
    monkeypatch.delenv("SOO_LIGHTNING")
    assert not [one for one in trainer().callbacks if isinstance(one, SecondOrder)]


def test_two_opt_ins_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOO_LIGHTNING", LINE)
    said = "SOO_LIGHTNING: method=shampoo,.*"
    with pytest.raises(ValueError, match=f"{said}the Trainer has the callback SecondOrder as well: opt in once"):
        trainer(callbacks=[SecondOrder()]).fit(Model(scheduler=True), loader())
    with pytest.raises(ValueError, match=rf"{said}or give it method=None: SecondOrderDDPStrategy\(method=None\)"):
        run = trainer(strategy=SecondOrderDDPStrategy())
        (callback,) = [one for one in run.callbacks if isinstance(one, SecondOrder)]
        callback.setup(run, Model(scheduler=True), "fit")

    class Own(Model):
        def configure_optimizers(self) -> Any:
            return Shampoo(self)

    with pytest.raises(ValueError, match=f"{said}configure_optimizers returns Shampoo already"):
        trainer().fit(Own(scheduler=True), loader())

    class None_(Model):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(RuntimeError, match="found no optimizer to take over"):
        trainer().fit(None_(scheduler=True), loader())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("method=shampoo,precondition_freqency=2", "did you mean 'precondition_frequency'"),
        ("nowhere.yaml", "SOO_LIGHTNING: nowhere.yaml: there is no such file"),
        ("1", "SOO_LIGHTNING: 1: method='1'; choose one of 'shampoo'"),
    ],
)
def test_what_the_variable_says_wrong(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    monkeypatch.setenv("SOO_LIGHTNING", value)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        trainer()
    assert words in str(refused.value)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("SOO_LIGHTNING", "MASTER_PORT")}
    return run_bounded(
        [sys.executable, *map(str, command)],
        seconds=150,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": TESTS, **environment},
    )


def test_off_costs_nothing() -> None:
    """The entry point imports neither torch nor anything of ours beside itself."""
    program = """
import sys
from importlib.metadata import entry_points
for group in ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"):
    (ours,) = [one for one in entry_points(group=group) if one.name == "lightning_soo"]
    assert ours.load()() == []
loaded = {name for name in sys.modules if name.split(".")[0] in ("torch", "lightning", "lightning_soo")}
assert loaded == {"lightning_soo", "lightning_soo._version", "lightning_soo.autoload"}, loaded
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr


def test_pytorch_lightning_in_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    done = run(HERE / "environment_script.py", tmp_path, SOO_LIGHTNING=LINE)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)] == ["Shampoo", "Shampoo"]
    assert len([line for line in (done.stdout + done.stderr).splitlines() if line.startswith("net.0.weight")]) == 1
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert_trained(saved["state_dict"], 2, **OPTIONS)
    assert saved["optimizer_states"][0]["second_order"]["complete"]


PYTORCH_LIGHTNING = """
import sys
import pytorch_lightning as pl
from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder
assert "lightning.pytorch" not in sys.modules  # not both
for callback in (SecondOrder(), PreconditionerMonitor()):
    assert pl.Trainer(callbacks=callback, logger=False, accelerator="cpu").callbacks[0] is callback
try:
    pl.Trainer(strategy="soo_fsdp2", accelerator="cpu")
except ImportError as error:
    assert "write 'import lightning as L' and 'L.Trainer'" in str(error), error
else:
    raise AssertionError("accepted")
"""


def test_pytorch_lightning_alone() -> None:
    pytest.importorskip("pytorch_lightning")
    done = run("-c", PYTORCH_LIGHTNING)
    assert done.returncode == 0, done.stderr[-4000:]
