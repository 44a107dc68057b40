"""Starts a world of gloo ranks on this machine."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
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


def run_bounded(
    command: Sequence[str], *, seconds: float, env: Mapping[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a launcher and what it starts to the end; what takes longer fails with every process's Python stacks."""
    started = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**env, "PYTHONFAULTHANDLER": "1"},
    )
    try:
        output, errors = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        ranks = psutil.Process(started.pid).children(recursive=True)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGABRT)
        for rank in psutil.wait_procs(ranks, timeout=10)[1]:
            rank.kill()
        started.kill()
        try:
            output, errors = started.communicate(timeout=10)
        except subprocess.TimeoutExpired as held:  # by what its launcher has left behind; these are bytes
            output, errors = ((part or b"").decode(errors="replace") for part in (held.output, held.stderr))
        raise AssertionError(
            f"{' '.join(command)}: longer than {seconds:g} s\n{output[-4000:]}\n{errors[-20000:]}"
        ) from None
    return subprocess.CompletedProcess(command, started.returncode, output, errors)


def torchrun(program: str | Path, ranks: int, *arguments: object, timeout: float = 240.0) -> None:
    """Run ``program`` in ``ranks`` processes, one BLAS thread each; fails with the end of their output."""
    run = run_bounded(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
            *(str(program), *map(str, arguments)),
        ],
        seconds=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": TESTS},
    )
    assert run.returncode == 0, run.stderr[-4000:]
