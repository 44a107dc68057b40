"""SONew's step on a GPU for all parameters at once, in place (Devvrit et al. 2023, arXiv 2311.10085).

Import it only where triton is installed (it comes with CUDA builds of torch). The mathematics is that of
:mod:`lightning_soo.linalg.banded` with at most one neighbour, which tests hold this against.

Per element with one neighbour and float32, 16 bytes are read (gradient, momentum, two bands) and 16 written (momentum,
two bands, and the direction over the gradient); 24 in all with half-precision gradients; 8 fewer without a neighbour.
Chains above ``_LONGEST`` read their diagonal twice where the ridge is relative. State: two bands and the momentum, 12
bytes (10 in half precision); nothing else is kept but 16 bytes for each program, about one in a thousand elements.

Why programs may run in any order. A direction needs the *new* statistics of both neighbours, which are computed a
second time from the old ones rather than waited for. Work is cut at ends of chains, so that all neighbours lie in the
same program, which loads everything before it stores anything. A chain that is too long for one program is cut into
pieces; the elements next to each piece, and the largest diagonal of each such chain, are set aside by a launch before.
"""

from __future__ import annotations

import struct
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_soo.preconditioners.banded_kernels_triton import HALO, add_up, set_aside, step

# Longest chain that one program holds; longer ones are cut into pieces of _TILE.
_LONGEST = 2048
_TILE = 1024
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ROW = struct.Struct("10q7d")

# In the interpreter kernels read the host's memory, else a GPU's; triton decides when it is imported.
INTERPRETED = not isinstance(step, triton.JITFunction)


class _Shape(NamedTuple):
    """What the programs of a run depend on."""

    n: int
    base: int  # of the run's start in its chain
    chain_length: int
    dtype: torch.dtype
    given: bool  # ridges, one for each chain
    coupled: bool

    @property
    def cut(self) -> bool:
        return self.chain_length > _LONGEST

    @property
    def columns(self) -> int:
        return _TILE if self.cut else 1 << max(self.chain_length - 1, 0).bit_length()

    @property
    def chains(self) -> int:
        return -(-(self.base + self.n) // self.chain_length) if self.n else 0

    def positions(self) -> Tensor:
        """First element of each program, counted from the beginning of the run's first chain."""
        chains = torch.arange(self.chains, device="cpu") * self.chain_length
        if not self.cut:
            return chains[:: max(_TILE // self.columns, 1)]
        pieces = (
            chains[:, None] + torch.arange(0, min(self.chain_length, self.base + self.n), _TILE, device="cpu")
        ).flatten()
        ends = torch.minimum(pieces + _TILE, (pieces // self.chain_length + 1) * self.chain_length)
        return pieces[(ends > self.base) & (pieces < self.base + self.n)]


@dataclass
class _Plan:
    """Programs of all runs.

    Attributes:
        programs: ``(programs, 2)``: run and position; those of a launch, and in it those of a run, side by side.
        spans: ``(runs, 2)``: first program, number of programs.
        launches: one of the runs, and first and last program; those of cut chains come first.
        pieces: programs of cut chains.
    """

    programs: Tensor
    spans: Tensor
    launches: list[tuple[_Shape, int, int]]
    pieces: int


@lru_cache(maxsize=8)  # as many sets of parameters that move together; in training there is one for each part of a step
def _plan(shapes: tuple[_Shape, ...], device: torch.device) -> _Plan:
    def kind(index: int) -> tuple[Any, ...]:
        shape = shapes[index]
        return (not shape.cut, shape.columns, str(shape.dtype), shape.given, shape.coupled)

    host = torch.device("cpu")  # whatever the default device is
    spans = torch.zeros(len(shapes), 2, dtype=torch.int64, device=host)
    programs = [spans[:0]]
    launches: list[tuple[_Shape, int, int]] = []
    count = pieces = 0
    previous = None
    for index in sorted((index for index, shape in enumerate(shapes) if shape.n), key=kind):
        positions = shapes[index].positions()
        programs.append(torch.stack([torch.full_like(positions, index), positions], 1))
        spans[index, 0], spans[index, 1] = count, positions.numel()
        begin = count
        if kind(index) == previous:
            begin = launches.pop()[1]
        previous, count = kind(index), count + positions.numel()
        launches.append((shapes[index], begin, count))
        pieces = count if shapes[index].cut else pieces
    return _Plan(torch.cat(programs).to(device), spans.to(device), launches, pieces)


class DeviceRuns:
    """The parameters of one step on one device, added one by one and then carried out together."""

    def __init__(self) -> None:
        self._rows: list[list[Any]] = []
        self._shapes: list[_Shape] = []
        self._kept: list[tuple[Tensor | None, ...]] = []
        self._device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._rows)

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
        """Add one run, as :meth:`.banded_host.HostRuns.add` does.

        Raises:
            ValueError: arrays that :func:`is_possible` refuses, or on another device than those before.
        """
        if not is_possible(gradient, momentum, bands):
            raise ValueError(f"no kernel for {gradient.dtype} gradients and {tuple(bands.shape)} {bands.dtype}")
        if self._rows and bands.device != self._device:
            raise ValueError(f"runs on {bands.device} and {self._device}: each device needs its own")
        self._device = bands.device
        per_chain = ridge.to(bands.dtype).contiguous() if isinstance(ridge, Tensor) else None
        n, base = gradient.shape[0], start % chain_length
        shape = _Shape(n, base, chain_length, gradient.dtype, per_chain is not None, bands.shape[0] == 2)
        self._kept.append((gradient, momentum, bands, per_chain))
        self._shapes.append(shape)
        self._rows.append([
            gradient.data_ptr(), momentum.data_ptr(), bands.data_ptr(),
            0 if per_chain is None else per_chain.data_ptr(),
            n, base, chain_length, bands.stride(0), *owned,
            1.0 - beta1, decay, weight, scale, graft_eps, 1.0 if isinstance(ridge, Tensor) else ridge, gamma,
        ])  # fmt: skip

    def carry_out(self) -> Tensor:
        """Take the step, without waiting for it.

        Returns:
            ``(count, 2)`` float64 on the device: of every run, the sums of squares of the direction and of the graft in
            the bands' units.
        """
        device = self._device
        if not self._rows:
            return torch.zeros(0, 2, dtype=torch.float64)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            plan = _plan(tuple(self._shapes), device)
            peaks = self._place_peaks()  # noqa: F841  kept until everything is launched
            table = self._upload()
            halos = torch.empty(plan.pieces, HALO.value, dtype=torch.float32, device=device)
            sums = torch.empty(plan.programs.shape[0], 2, dtype=torch.float64, device=device)
            totals = torch.empty(len(self), 2, dtype=torch.float64, device=device)
            for before in (True, False):
                for shape, first, last in plan.launches:
                    if before and not (shape.cut and (shape.coupled or not shape.given)):
                        continue
                    grid, programs, around = (last - first,), plan.programs[first:last], halos[first:last]
                    dtype = _DTYPES[shape.dtype]
                    if before:
                        set_aside[grid](
                            table, programs, around, PIECE=_TILE, DTYPE=dtype, GIVEN=shape.given, COUPLED=shape.coupled
                        )
                        continue
                    rows = max(_TILE // shape.columns, 1)
                    step[grid](
                        table, table.view(torch.float64), programs, around, sums[first:last],
                        ROWS=rows, COLUMNS=shape.columns, DTYPE=dtype, CUT=shape.cut,
                        GIVEN=shape.given or shape.cut, COUPLED=shape.coupled,
                        num_warps=rows * shape.columns // 128,
                    )  # fmt: skip
            add_up[(len(self),)](sums, plan.spans, totals, BLOCK=_TILE)
        return totals

    def _place_peaks(self) -> Tensor:
        """Zeros for the largest diagonals of cut chains whose ridge is relative; their rows point there."""
        wanted = [shape.chains if shape.cut and not shape.given else 0 for shape in self._shapes]
        peaks = torch.zeros(sum(wanted), dtype=torch.float32, device=self._device)
        position = 0
        for row, count in zip(self._rows, wanted, strict=True):
            if count:
                row[3] = peaks.data_ptr() + position * peaks.element_size()
                position += count
        return peaks

    def _upload(self) -> Tensor:
        """The table of all runs on the device, ``(count * 17,)`` int64: from pinned memory, or the host would wait."""
        packed = bytearray().join(_ROW.pack(*row) for row in self._rows)
        rows = torch.frombuffer(packed, dtype=torch.int64)
        if self._device.type == "cpu":
            return rows
        return rows.pin_memory().to(self._device, non_blocking=True)


def is_possible(gradient: Tensor, momentum: Tensor, bands: Tensor) -> bool:
    """Whether there is a kernel for such arrays: on a GPU (or interpreted), contiguous, at most one neighbour."""
    return (
        bands.device.type == ("cpu" if INTERPRETED else "cuda")
        and gradient.device == momentum.device == bands.device
        and gradient.dtype == momentum.dtype
        and gradient.dtype in _DTYPES
        and bands.dtype == torch.float32
        and bands.shape[0] <= 2
        and gradient.is_contiguous()
        and momentum.is_contiguous()
        and (bands.stride(1) == 1 or bands.shape[1] <= 1)
    )
