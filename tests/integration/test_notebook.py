"""Worker processes in a Jupyter kernel: the notebook runs once, survives its stop button, and leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")

CELLS = [
    """
import os, signal, time, torch
from lightning_soo import Shampoo
print("running")
torch.set_num_threads(1)

def make(workers):
    torch.manual_seed(0)
    net = torch.nn.Linear(30, 20)
    return net, Shampoo(net, precondition_frequency=2, workers=workers)

def train(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 30, generator=torch.Generator().manual_seed(optimizer.steps))
        net(x).square().mean().backward()
        optimizer.step()

net, optimizer = make({"kind": "process", "count": 2, "max_restarts": 0})
train(net, optimizer, 8)
""",
    # what the stop button does: a signal to the kernel's whole process group, in which the workers are
    """
assert os.getpgrp() == os.getpid()
try:
    os.killpg(os.getpgrp(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
""",
    """
train(net, optimizer, 8)
executor = optimizer._refresher.executor
assert executor.kind == "process" and executor.restarts == 0
assert optimizer.diagnostics()["condition_number"] > 1
reference = make("inline")
train(*reference, 16)
assert torch.equal(net.weight, reference[0].weight)
print("workers", *executor.processes)
""",
]


def test_a_notebook_trains_and_leaves_no_process(tmp_path: Path) -> None:
    notebook: Any = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    text = "".join(
        output["text"] for cell in notebook.cells for output in cell.outputs if output.get("name") == "stdout"
    )
    running, interrupted, workers = text.splitlines()
    assert (running, interrupted) == ("running", "interrupted")
    pids = workers.split()[1:]
    assert len(pids) == 2
    end = time.monotonic() + 10  # the kernel has ended, and nobody closed the optimizer
    while any(is_worker(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_worker(pid: str) -> bool:
    try:
        return b"refresh/worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
