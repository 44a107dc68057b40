"""Fabric by one call: under its own strategy and under one of ours by name, launched by its own command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from launching import TESTS, run_bounded
from lightning.fabric import Fabric
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from fabric_script import train
from plain_loop import assert_trained
from worker_trainer import OPTIONS

from lightning_soo import KFAC, Shampoo
from lightning_soo.integrations.fabric import setup

LINE = ",".join(["method=shampoo", *(f"{name}={value}" for name, value in OPTIONS.items())])


def one_process() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def test_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("click")
    script = [Path(__file__).parent / "fabric_script.py", "--", tmp_path, LINE, "ddp", "soo_fsdp2"]
    command = ["-m", "lightning.fabric.cli", "--accelerator", "cpu", "--devices", "2", "--main-port", "29417"]
    run = run_bounded(
        [sys.executable, *command, *map(str, script)],
        seconds=150,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": TESTS},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    table = [line.split() for line in (run.stdout + run.stderr).splitlines() if line.startswith("net.0.weight")]
    assert [line[2:4] for line in table] == [["ddp", "shampoo"], ["fsdp2", "shampoo"]]
    for strategy in ("ddp", "soo_fsdp2"):
        assert_trained(torch.load(tmp_path / f"{strategy}.pt", weights_only=True), 2, **OPTIONS)


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = train(one_process(), LINE)
    assert_trained(module.state_dict(), 1, **OPTIONS)
    optimizer.close()
    monkeypatch.setenv("SOO_CONFIG", "method=kfac")
    net = nn.Linear(3, 3)
    _, wrapped = setup(one_process(), net, torch.optim.SGD(net.parameters(), lr=0.1), accumulate=2, data_workers=3)
    kfac = wrapped.optimizer
    assert isinstance(kfac, KFAC) and "1 of 3x3" in kfac.plan_table()
    assert (kfac.data_workers, kfac._micro_batches) == (3, 2)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOO_CONFIG", raising=False)
    net = nn.Linear(3, 3)
    adamw = torch.optim.AdamW(net.parameters())
    with pytest.raises(TypeError, match="no optimizer to take over"):
        setup(one_process(), net, config=LINE)
    with pytest.raises(ValueError, match="set the environment variable SOO_CONFIG"):
        setup(one_process(), net, adamw)
    with pytest.raises(ValueError, match="did you mean 'precondition_frequency'"):
        setup(one_process(), net, adamw, config={"precondition_freqency": 2})
    with pytest.raises(ValueError, match=r"the optimizer is Shampoo already, and .* opt in once"):
        setup(one_process(), net, Shampoo(net), config="method=soap")
    assert type(adamw) is torch.optim.AdamW
    setup(one_process(), net, Shampoo(net))  # only attached
