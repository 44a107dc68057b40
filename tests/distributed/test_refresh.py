"""Executors under DDP of 2 and 3 ranks: the same bits, late, killed or failing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_executor_late_killed_and_failing(ranks: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    run = subprocess.run(
        [*command, str(Path(__file__).parent / "worker_refresh.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    errors = {(tmp_path / f"error{rank}.txt").read_text() for rank in range(ranks)}
    assert len(errors) == 1
    (text,) = errors
    assert "3 refreshes in a row failed on rank" in text and "started at step" in text and "overrides" in text
