"""Starts a world of gloo ranks on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(program: str | Path, ranks: int, *arguments: object, timeout: float = 240.0) -> None:
    """Run ``program`` in ``ranks`` processes, one BLAS thread each; fails with the end of their output."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
            *(str(program), *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
