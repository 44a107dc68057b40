"""SONew with one neighbour, gradient to direction in one sweep over memory (Devvrit et al. 2023, arXiv 2311.10085).

The step is bound by memory: per element it reads the gradient, the momentum and two bands, and writes the momentum, two
bands and the direction, once each (32 bytes in float32); moving the parameter takes 12 more, where fused AdamW takes 28
in all. Adam's second moment is the diagonal of the statistics, so the graft costs no state and no traffic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from lightning_soo.linalg.norms import squared_norm
from lightning_soo.preconditioners.banded import BandedStatistics

logger = logging.getLogger(__name__)

# Four times that of `banded.direction`: the arrays leave the second-level cache, but a quarter of the calls wins more.
CHUNK = 1 << 18
_ROWS = 4
_Kernel = Callable[..., Tensor]


def tridiagonal_step(
    statistics: BandedStatistics,
    gradient: Tensor,
    momentum: Tensor,
    *,
    beta1: float,
    decay: float,
    weight: float,
    magnitude: float,
    correction: float,
    eps: float,
    ridge: Tensor | float,
    gamma: float,
    out: Tensor,
    owned: tuple[int, int] | None = None,
    chunk: int = CHUNK,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Observe a gradient, filter it, and write ``out = X momentum``: what the separate functions give, to rounding.

    On the host, in chunks that stay in cache. A neighbour to the right is read for a product from the gradient alone,
    which nobody writes; a direction needs its right neighbour's *new* statistics, so directions lag one element behind
    the statistics, and each chunk recomputes the factor of the element before its first.

    Args:
        statistics: of bandwidth 1, float32 or float64.
        gradient: ``(n,)`` in the dtype of the statistics, as are all other arrays.
        momentum: ``(n,)``, becomes ``beta1 momentum + (1 - beta1) gradient``.
        beta1: decay of the momentum.
        decay, weight, magnitude: as in :meth:`BandedStatistics.observe`.
        correction: ``1 - b2^t``, for Adam's second moment.
        eps: of Adam's denominator.
        ridge: in the units of the bands *after* this observation (:meth:`BandedStatistics.ridge`): call
            ``statistics.rescale`` first, so that the scale is the one it is computed with; a number, 0-dim or ``(n,)``.
        gamma: relative threshold of the edge removal.
        out: ``(n,)``, receives the direction.
        owned: ``[first, last)`` of the elements whose norms are summed; all by default.
        chunk: elements treated at a time.
        compiled: use ``torch.compile``, with one compilation each for the statistics and the direction whatever ``n``.

    Returns:
        Sums of squares over the owned elements, float64: of ``out``, and of ``momentum / (sqrt(second) + eps)`` with
        the corrected second moment and the uncorrected momentum.
    """
    statistics.rescale(decay=decay, magnitude=magnitude)
    statistics.observations += 1
    n, bands, scale = gradient.shape[0], statistics.bands, statistics.scale
    begin, end = owned if owned is not None else (0, n)
    zero = torch.zeros((), dtype=torch.float64, device=bands.device)
    if n == 0:
        return zero, zero
    # sqrt(d / correction) / scale + eps = (sqrt(d) + unit eps) / unit
    unit = scale * correction**0.5
    ridge = torch.as_tensor(ridge, dtype=bands.dtype, device=bands.device)
    options = [1.0 - beta1, decay, weight, scale, unit * eps]
    numbers: Tensor | None = None
    if compiled and scale == 1.0:
        # numbers that change with the step travel as a tensor, or each step would compile anew
        numbers = torch.tensor([*options, gamma], dtype=bands.dtype, device=bands.device)
    moved: list[Tensor] = []
    grafted: list[Tensor] = []
    # elements that lack a neighbour or an owner are few, so that compiled chunks hold all others
    bounds = [0, *range(chunk, n, chunk), n]
    if numbers is not None:
        lead, tail = max(begin, 1) + 1, min(end, n - 1)
        bounds = [0, *range(lead, tail - 1, chunk), tail, n] if tail - lead > 1 else bounds
    longest = max(last - first for first, last in pairwise(bounds))
    buffer = torch.empty(_ROWS, longest + 2, dtype=bands.dtype, device=bands.device)
    for first, last in pairwise(bounds):
        back, lag, edge = max(first - 2, 0), max(first - 1, 0), last if last == n else last - 1
        inside = max(begin, 1) < first and last <= min(end, n - 1)
        offset = (statistics.chain_length - 1 - statistics.start - first) % statistics.chain_length
        ends = bands[1, first + offset : last : statistics.chain_length] if offset < last - first else None
        size, products = last - first, min(last, n - 1) - first
        part = ridge[back:last] if ridge.ndim else ridge
        values, following = gradient[first:last], gradient[first + 1 : first + 1 + products]
        second, coupling, filtered = bands[0, first:last], bands[1, first : first + products], momentum[first:last]
        if numbers is not None and inside and size > 1:
            observe, direct = _compiled(_observe), _compiled(_direct)
            grafted.append(observe(values, following, filtered, second, coupling, numbers))
            if ends is not None:
                ends.zero_()
            neighbours = momentum[back:last], bands[0, back:last], bands[1, back : last - 1]
            moved.append(direct(*neighbours, part.expand(last - back), out[lag:edge], numbers))
            continue
        _observe_in_place(values, following, filtered, second, coupling, options, buffer)
        if ends is not None:
            ends.zero_()
        lower, upper = max(first, begin), min(last, end)
        if lower < upper:
            root = torch.sqrt(bands[0, lower:upper], out=buffer[0, : upper - lower]).add_(unit * eps)
            torch.div(momentum[lower:upper], root, out=root)
            if scale != 1.0:  # extreme gradients: squares would not fit
                root.mul_(unit)
            grafted.append(torch.dot(root, root))
        work = buffer[:, : last - back]
        _direct_in_place(work, bands[:, back:last], momentum[back:last], part, gamma, lag - back, out[lag:edge])
        lower, upper = max(lag, begin), min(edge, end)
        if lower < upper:
            moved.append(torch.dot(out[lower:upper], out[lower:upper]))
    graft = torch.stack(grafted).sum(dtype=torch.float64) * (unit**2 if scale == 1.0 else 1.0) if grafted else zero
    total = torch.stack(moved).sum(dtype=torch.float64) if moved else zero
    if not 1e-30 < float(total) < 1e37:  # extreme gradients: the graft is of the order of one, but not the direction
        total = squared_norm(out[begin:end])
    return total, graft


def _observe_in_place(
    values: Tensor,
    following: Tensor,
    momentum: Tensor,
    diagonal: Tensor,
    coupling: Tensor,
    options: list[float],
    buffer: Tensor,
) -> None:
    """Advance momentum, diagonal and coupling; ``following`` is the gradient of the right neighbours."""
    complement, decay, weight, scale, _ = options
    momentum.lerp_(values, complement)
    if scale != 1.0:
        values = torch.mul(values, scale, out=buffer[0, : values.shape[0]])
        following = torch.mul(following, scale, out=buffer[1, : following.shape[0]])
    diagonal.mul_(decay).addcmul_(values, values, value=weight)
    coupling.mul_(decay).addcmul_(values[: following.shape[0]], following, value=weight)


def _direct_in_place(
    buffer: Tensor, bands: Tensor, vector: Tensor, ridge: Tensor, gamma: float, first: int, out: Tensor
) -> None:
    """``X vector`` of a piece, from its element ``first`` on, into ``out``: ``linalg.banded`` in fewer passes.

    The gate is a 0 or 1 in floating point: a boolean array and ``where`` take ten times as long on a CPU.
    """
    diagonal, lower, inverse, inner = buffer.unbind()
    coupling, residual, psi = bands[1, :-1], inverse[:-1], lower[:-1]
    tiny = torch.finfo(bands.dtype).tiny
    if ridge.ndim:
        torch.clamp_min(ridge, tiny, out=diagonal).add_(bands[0])
    else:
        torch.add(bands[0], ridge.clamp_min(tiny), out=diagonal)
    here = diagonal[:-1]
    torch.div(coupling, diagonal[1:], out=psi)
    torch.addcmul(here, psi, coupling, value=-1, out=residual)
    threshold = torch.mul(here, gamma, out=inner[:-1])
    psi.mul_(torch.gt(residual, threshold, out=threshold))
    torch.addcmul(here, psi, coupling, value=-1, out=residual)
    inverse[-1:].copy_(diagonal[-1:])
    torch.addcmul(vector[:-1], psi, vector[1:], value=-1, out=inner[:-1])
    inner[-1:].copy_(vector[-1:])
    inner.div_(inverse)
    skip, size = first, out.shape[0]
    if skip == 0:
        out[:1].copy_(inner[:1])
        out, skip, size = out[1:], 1, size - 1
    torch.addcmul(inner[skip : skip + size], psi[skip - 1 :][:size], inner[skip - 1 :][:size], value=-1, out=out)


def _observe(
    gradient: Tensor, following: Tensor, momentum: Tensor, diagonal: Tensor, coupling: Tensor, numbers: Tensor
) -> Tensor:
    """For the compiler: one loop. Returns the sum of squares of the graft."""
    filtered = momentum + (gradient - momentum) * numbers[0]
    scaled = gradient * numbers[3]
    weighted = scaled * numbers[2]
    second = diagonal * numbers[1] + weighted * scaled
    product = coupling * numbers[1] + weighted * (following * numbers[3])
    graft = (filtered / (second.sqrt() + numbers[4])).square().sum()
    momentum.copy_(filtered)
    diagonal.copy_(second)
    coupling.copy_(product)
    return graft


def _direct(vector: Tensor, diagonal: Tensor, coupling: Tensor, ridge: Tensor, out: Tensor, numbers: Tensor) -> Tensor:
    """For the compiler: one loop, in which each element's factor is computed twice, not stored.

    Comparisons stay inside it: a boolean array between two loops made them 18 times slower.
    """
    ridge = ridge.clamp_min(torch.finfo(diagonal.dtype).tiny)

    def half(index: int) -> tuple[Tensor, Tensor]:
        stop = -1 if index == 0 else None
        here = diagonal[index : -2 + index] + ridge[index : -2 + index]
        there = diagonal[index + 1 : stop] + ridge[index + 1 : stop]
        edge = coupling[index:stop]
        psi = edge / there
        residual = here - psi * edge
        keep = residual > numbers[5] * here
        psi = torch.where(keep, psi, 0.0)
        return psi, (vector[index : -2 + index] - psi * vector[index + 1 : stop]) / torch.where(keep, residual, here)

    psi, before = half(0)
    _, here = half(1)
    direction = here - psi * before
    out.copy_(direction)
    return direction.square().sum()


@cache
def compiler_works() -> bool:
    """Whether ``torch.compile`` can compile here (it needs a C++ compiler on a CPU); asked once, and said where not."""
    try:
        torch.compile(torch.square, dynamic=False)(torch.zeros(8))
    except Exception as error:
        logger.warning("torch.compile does not work here (%s): the step runs uncompiled", str(error).splitlines()[0])
        return False
    return True


@cache
def _compiled(function: _Kernel) -> _Kernel:
    return cast(_Kernel, torch.compile(function, dynamic=True))
