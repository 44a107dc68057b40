"""Timing in turns, the machine's rates, and the machine's name."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from lightning_soo.planning.machine import seconds


def best_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """The fastest of several runs, after one that is not counted: a rate the machine can reach."""
    return min(seconds(run, repeats))


def gemm_rate(dtype: torch.dtype, order: int = 1000) -> float:
    """Flops a second of a square matrix product."""
    a, b = (torch.randn(order, order).to(dtype) for _ in range(2))
    return 2.0 * order**3 / best_seconds(lambda: a @ b)


def eigh_seconds(order: int = 1000) -> float:
    """Seconds of one float64 eigendecomposition by numpy at one BLAS thread, as refreshes run."""
    matrix = np.random.default_rng(0).standard_normal((order, order))
    matrix = matrix @ matrix.T
    with threadpool_limits(1, "blas"):
        return best_seconds(lambda: np.linalg.eigh(matrix), repeats=3)


def memory_rate() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.zeros(64 * 1024 * 1024 // 4)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * 4 / best_seconds(lambda: target.copy_(source))


def spread(values: list[float]) -> str:
    """Median with the smallest and largest value."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def machine() -> str:
    """Processor, threads, versions and commit, for the head of a results file."""
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return (
        f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family', '?')}, "
        f"model {fields.get('model', '?')}; {' '.join(flags)}), {torch.get_num_threads()} threads; "
        f"torch {torch.__version__}, lightning {lightning.__version__}, numpy {np.__version__}; commit {commit}"
    )


def processor(where: str) -> str:
    """Of what ``machine`` returned, the part on which losses depend: rounding differs between processors."""
    return where.partition(";")[0].removesuffix(")") + ")" if ";" in where else where


def report(lines: list[str], output: Path | None) -> None:
    """Print a table, and write it where asked."""
    print("\n".join(lines))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n".join([*lines, ""]))
