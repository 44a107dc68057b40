"""SONew with one neighbour as one kernel on a GPU: statistics, factor and direction (Devvrit et al. 2023, 2311.10085).

Import it only where triton is installed (it comes with CUDA builds of torch). Per element 16 bytes are read and 16
written in float32, as in :mod:`lightning_soo.preconditioners.tridiagonal`.

Why no program can read what another has already changed. A direction needs the *new* momentum and statistics of both
neighbours. A program owns ``BLOCK`` elements and recomputes those of the one before and the one after from the old
arrays and the gradient. Nothing it reads is written by the launch: the new arrays are other memory than the old ones
(checked), and every element of them is stored by the one program that owns it. So programs may run in any order, and
rows need no program of their own. Updating in place would need a barrier across the grid, or a second launch that
reads 12 bytes per element again; the second set of arrays is what that costs, and it is swapped in, not copied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_soo.preconditioners.banded import BandedStatistics

_ONE, _PER_ELEMENT, _PER_CHAIN = 0, 1, 2
_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _advance(  # type: ignore[no-untyped-def]
    gradient, momentum, bands, ridge, at, valid, n, start, chain_length, complement, decay, weight, scale, floor,
    RIDGE: tl.constexpr,
):  # fmt: skip
    """New momentum, second moment, and second moment with its ridge, of elements ``at``; and their scaled gradient."""
    value = tl.load(gradient + at, mask=valid, other=0.0).to(tl.float32)
    first = tl.load(momentum + at, mask=valid, other=0.0)
    second = tl.load(bands + at, mask=valid, other=0.0)
    first += (value - first) * complement
    value *= scale
    second = second * decay + weight * value * value
    if RIDGE == 0:
        added = tl.load(ridge)
    elif RIDGE == 1:
        added = tl.load(ridge + at, mask=valid, other=1.0)
    else:
        chain = (start + at) // chain_length - start // chain_length
        added = tl.load(ridge + chain, mask=valid, other=1.0)
    return value, first, second, second + tl.maximum(added, floor)


@triton.jit
def _couple(  # type: ignore[no-untyped-def]
    bands, at, valid, n, start, chain_length, decay, weight, gamma,
    value, first, diagonal, next_value, next_first, next_diagonal,
):  # fmt: skip
    """New coupling of ``at`` with its right neighbour; its coefficient ``psi``; and ``(D L^T m)`` there."""
    coupled = valid & (at + 1 < n) & ((start + at) % chain_length != chain_length - 1)
    coupling = tl.load(bands + n + at, mask=coupled, other=0.0)
    coupling = tl.where(coupled, coupling * decay + weight * value * next_value, 0.0)
    psi = coupling / next_diagonal
    residual = diagonal - psi * coupling
    keep = residual > gamma * diagonal
    psi = tl.where(keep, psi, 0.0)
    return coupling, psi, (first - psi * next_first) / tl.where(keep, residual, diagonal)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    gradient, momentum, bands, ridge, new_momentum, new_bands, out, sums,
    n, start, chain_length, begin, end, complement, decay, weight, scale, floor, denominator_eps, gamma,
    RIDGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    before, after = at - 1, at + 1
    here_valid, before_valid, after_valid = at < n, (before >= 0) & (before < n), after < n

    before_value, before_first, _before_second, before_diagonal = _advance(
        gradient, momentum, bands, ridge, before, before_valid, n, start, chain_length,
        complement, decay, weight, scale, floor, RIDGE,
    )  # fmt: skip
    value, first, second, diagonal = _advance(
        gradient, momentum, bands, ridge, at, here_valid, n, start, chain_length,
        complement, decay, weight, scale, floor, RIDGE,
    )  # fmt: skip
    after_value, after_first, _after_second, after_diagonal = _advance(
        gradient, momentum, bands, ridge, after, after_valid, n, start, chain_length,
        complement, decay, weight, scale, floor, RIDGE,
    )  # fmt: skip
    _, before_psi, before_inner = _couple(
        bands, before, before_valid, n, start, chain_length, decay, weight, gamma,
        before_value, before_first, before_diagonal, value, first, diagonal,
    )  # fmt: skip
    coupling, _, inner = _couple(
        bands, at, here_valid, n, start, chain_length, decay, weight, gamma,
        value, first, diagonal, after_value, after_first, after_diagonal,
    )  # fmt: skip
    direction = inner - before_psi * before_inner
    tl.store(new_momentum + at, first, mask=here_valid)
    tl.store(new_bands + at, second, mask=here_valid)
    tl.store(new_bands + n + at, coupling, mask=here_valid)
    tl.store(out + at, direction, mask=here_valid)

    # one partial sum per program, added up in a fixed order: atomics would differ between runs
    owned = here_valid & (at >= begin) & (at < end)
    graft = first / (tl.sqrt(second) + denominator_eps)
    direction = tl.where(owned, direction, 0.0)
    graft = tl.where(owned, graft, 0.0)
    tl.store(sums + 2 * program, tl.sum(direction * direction, axis=0))
    tl.store(sums + 2 * program + 1, tl.sum(graft * graft, axis=0))


def tridiagonal_step(
    statistics: BandedStatistics,
    gradient: Tensor,
    momentum: Tensor,
    *,
    new_bands: Tensor,
    new_momentum: Tensor,
    beta1: float,
    decay: float,
    weight: float,
    magnitude: float,
    correction: float,
    eps: float,
    ridge: Tensor,
    gamma: float,
    out: Tensor,
    owned: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`lightning_soo.preconditioners.tridiagonal.tridiagonal_step`, into a second set of arrays.

    Args:
        statistics: of bandwidth 1, float32. Its ``bands`` becomes ``new_bands``.
        gradient: ``(n,)``, any floating dtype; contiguous, as all arrays are.
        new_bands: ``(2, n)`` float32, overwritten; the old bands afterwards are free to be the next step's.
        momentum, new_momentum: ``(n,)`` float32; read, and overwritten.
        ridge: on the device: 0-dim, one per chain of the run (as :func:`~lightning_soo.linalg.banded.chain_peaks`
            returns them: nothing of the run's length is read), or ``(n,)``.
        magnitude, owned, and the rest: as there.

    Returns:
        The old bands, and the two float64 sums of squares.
    """
    bands, n = statistics.bands, gradient.shape[0]
    arrays = (bands, momentum, new_bands, new_momentum, out)
    if bands.shape[0] != 2 or any(array.dtype != torch.float32 for array in arrays):
        raise ValueError("the kernel is for bandwidth 1 and float32 statistics, momentum and direction")
    if not all(array.is_contiguous() for array in (*arrays, gradient, ridge)):
        raise ValueError("the kernel needs contiguous arrays")
    if len({array.data_ptr() for array in arrays if array.numel()}) != (len(arrays) if n else 0):
        raise ValueError("new_bands, new_momentum and out must not be the arrays that the kernel reads")
    statistics.rescale(decay=decay, magnitude=magnitude)
    statistics.observations += 1
    unit = statistics.scale * correction**0.5
    begin, end = owned if owned is not None else (0, n)
    kind = _ONE if ridge.ndim == 0 else _PER_ELEMENT if ridge.shape[0] == n else _PER_CHAIN
    programs = triton.cdiv(n, _BLOCK)
    sums = torch.zeros(programs, 2, dtype=torch.float32, device=bands.device)
    if n:
        _kernel[(programs,)](
            gradient, momentum, bands, ridge, new_momentum, new_bands, out, sums,
            n, statistics.start, statistics.chain_length, begin, end,
            1.0 - beta1, decay, weight, statistics.scale, torch.finfo(torch.float32).tiny, unit * eps, gamma,
            RIDGE=kind, BLOCK=_BLOCK,
        )  # fmt: skip
    statistics.bands = new_bands
    totals = sums.sum(0, dtype=torch.float64)
    return bands, totals[0], totals[1] * unit**2
