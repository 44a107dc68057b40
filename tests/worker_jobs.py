"""Jobs for workers, and what a test may ask about their processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from lightning_soo.refresh.jobs import Job

ROOT = "lightning_soo.linalg.inverse_roots:inverse_roots"


def root_job(order: int, seed: int = 0) -> Job:
    matrix = np.random.default_rng(seed).standard_normal((order, order)).astype(np.float32)
    options = {"divisor": 1.0, "exponent": 4.0, "eps": 1e-6, "relative_eps": True}
    return Job(
        function=ROOT, arrays=(matrix @ matrix.T, matrix.T @ matrix), options=options, result_bytes=16 * order**2
    )


def other_job(name: str, **options: Any) -> Job:
    """A function of ``job_functions``, which workers find as this module was found."""
    array = np.arange(16.0).reshape(4, 4)
    return Job(function=f"job_functions:{name}", arrays=(array,), options=options, result_bytes=array.nbytes)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def processor_ticks(pid: int) -> int:
    """Hundredths of a second that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)
