"""SONew's step on a CPU as one call of compiled code for all parameters: ``banded_host.cpp``, built at first use.

The library is compiled for this machine's processor by ``$CXX``, ``c++``, ``g++`` or ``clang++``, in about five
seconds, and kept in ``$XDG_CACHE_HOME/lightning_soo`` (``~/.cache/lightning_soo``) under a name that says what it was
built from. Where there is no compiler the step runs as separate torch calls: the same numbers, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
# without -ffast-math: values that are not finite, and the order of additions within an element, keep their meaning
_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
# tuned for this processor as far as the compiler knows how
_TUNED = [["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], []]
_KINDS = {
    (torch.float32, torch.float32): 0,
    (torch.float64, torch.float64): 1,
    (torch.bfloat16, torch.float32): 2,
}


class _Run(ctypes.Structure):
    """As ``struct Run`` of banded_host.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gradient", "momentum", "bands", "ridge")),
        *((name, ctypes.c_int64) for name in ("n", "start", "chain_length", "stride", "bandwidth")),
        *((name, ctypes.c_int64) for name in ("own_begin", "own_end", "kind")),
        *((name, ctypes.c_double) for name in ("complement", "decay", "weight", "scale", "graft_eps")),
        *((name, ctypes.c_double) for name in ("ridge_eps", "gamma", "direction_square", "graft_square")),
    )


class HostRuns:
    """The parameters of one step, added one by one and then carried out together."""

    def __init__(self) -> None:
        self._runs: list[_Run] = []
        self._kept: list[Tensor | None] = []  # what the pointers point to

    def __len__(self) -> int:
        return len(self._runs)

    def add(
        self,
        gradient: Tensor,
        momentum: Tensor,
        bands: Tensor,
        *,
        start: int,
        chain_length: int,
        owned: tuple[int, int],
        beta1: float,
        decay: float,
        weight: float,
        scale: float,
        graft_eps: float,
        ridge: Tensor | float,
        gamma: float,
    ) -> None:
        """Add one run; what each argument means stands in :func:`.tridiagonal.tridiagonal_step`.

        Args:
            gradient: ``(n,)``, receives the direction.
            bands: ``(b + 1, n)``, rows of one buffer.
            owned: ``[first, last)`` of the elements whose squares are summed.
            graft_eps: added to the root of the diagonal in the units of the bands.
            ridge: one for each chain of the run, in those units; or a number: times the largest diagonal element of
                each chain before this step.

        Raises:
            ValueError: arrays that :func:`is_possible` refuses.
        """
        if not is_possible(gradient, momentum, bands):
            raise ValueError(f"no compiled step for {gradient.dtype} gradients and {tuple(bands.shape)} {bands.dtype}")
        per_chain = ridge.to(bands.dtype).contiguous() if isinstance(ridge, Tensor) else None
        self._kept += [gradient, momentum, bands, per_chain]
        self._runs.append(_Run(
            gradient.data_ptr(), momentum.data_ptr(), bands.data_ptr(),
            None if per_chain is None else per_chain.data_ptr(),
            gradient.shape[0], start, chain_length, bands.stride(0), bands.shape[0] - 1, *owned,
            _KINDS[gradient.dtype, bands.dtype], 1.0 - beta1, decay, weight, scale, graft_eps,
            0.0 if per_chain is not None else float(ridge), gamma,
        ))  # fmt: skip

    def carry_out(self) -> list[tuple[float, float]]:
        """Take the step; of every run, the sums of squares of the direction and of the graft in the bands' units."""
        if not self._runs:
            return []
        library = load()
        assert library is not None  # or none could have been added
        runs = (_Run * len(self._runs))(*self._runs)
        library.soo_banded_step(runs, len(runs), torch.get_num_threads())
        return [(run.direction_square, run.graft_square) for run in runs]


def is_possible(gradient: Tensor, momentum: Tensor, bands: Tensor) -> bool:
    """Whether there is a compiled step for such arrays: on a CPU, contiguous, at most four neighbours."""
    library = load() if bands.device.type == "cpu" else None
    return (
        library is not None
        and momentum.dtype == gradient.dtype
        and (gradient.dtype, bands.dtype) in _KINDS
        and bands.shape[0] - 1 <= library.soo_largest_band()
        and gradient.is_contiguous()
        and momentum.is_contiguous()
        and (bands.stride(1) == 1 or bands.shape[1] <= 1)
    )


def move(parameter: Tensor, direction: Tensor, *, shrink: float, alpha: float) -> bool:
    """``parameter <- shrink parameter + alpha direction`` in one pass over memory; False where that is not possible."""
    arrays = (parameter, direction)
    if any(a.device.type != "cpu" or a.dtype != torch.float32 or not a.is_contiguous() for a in arrays):
        return False
    library = load()
    if library is None:
        return False
    threads = torch.get_num_threads()
    library.soo_move(parameter.data_ptr(), direction.data_ptr(), parameter.numel(), shrink, alpha, threads)
    torch.autograd.graph.increment_version(parameter)  # what autograd saved of it is no longer true
    return True


@cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None, said once, where it cannot be had."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.warning("no C++ compiler (c++, g++, clang++ or $CXX): SONew's step runs as separate torch calls, slower")
        return None
    try:
        library = ctypes.CDLL(str(_build(compiler, _folder())))
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        first = next(iter(said.strip().splitlines()), type(error).__name__)
        logger.warning("%s could not build SONew's step (%s): it runs as separate torch calls, slower", compiler, first)
        return None
    library.soo_largest_band.restype = ctypes.c_int64
    library.soo_size_of_run.restype = ctypes.c_int64
    library.soo_banded_step.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    library.soo_banded_step.restype = None
    library.soo_move.argtypes = [*[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_double] * 2, ctypes.c_int64]
    library.soo_move.restype = None
    assert library.soo_size_of_run() == ctypes.sizeof(_Run)
    return library


def _build(compiler: str, folder: Path) -> Path:
    """Compile, unless it was done before; several ranks may do so at once, and each replaces the whole file."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    identity = hashlib.sha256(_SOURCE.read_bytes() + version + _processor() + " ".join(_FLAGS).encode()).hexdigest()
    path = folder / f"banded_{identity[:20]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / path.name
        for tuned in _TUNED:
            command = [compiler, *_FLAGS, *tuned, str(_SOURCE), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, check=False, timeout=300)
            if result.returncode == 0:
                break
        result.check_returncode()
        built.replace(path)
    return path


def _processor() -> bytes:
    """What ``-march=native`` depends on: a shared home must not hand one processor's code to another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode()


def _folder() -> Path:
    """A folder of this user alone that can be written to."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (home / "lightning_soo", Path(tempfile.gettempdir()) / f"lightning_soo-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise OSError("no folder for compiled code: set XDG_CACHE_HOME to one that can be written to")
