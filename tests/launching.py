"""Starts a world of gloo ranks on this machine."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def leave() -> None:
    """End a rank whose checks have all passed, without the interpreter's own end.

    FSDP's and DDP's objects refer to process groups in cycles; destroyed in the interpreter's order, gloo's threads
    abort the process now and then.
    """
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_cases(cases: Sequence[Callable[[int], None]]) -> None:
    """One rank: every case with this rank's number, all in one world."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in cases:
        case(dist.get_rank())
        dist.barrier()
        if dist.get_rank() == 0:
            print(case.__name__, flush=True)
    leave()


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
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": TESTS},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
