"""Banded LogDet solutions: the sparse inverse whose Cholesky factor has the band of the statistics.

``X = argmin -logdet X + <X, S>`` over positive definite ``X`` with the sparsity of a band of width ``b`` is
``X = L D L^T`` with ``I_j = {j+1, ..., j+b}`` and (Devvrit et al. 2023, arXiv 2311.10085)::

    L[I_j, j] = -S[I_j, I_j]^-1 S[I_j, j]        1/D_j = S[j, j] - S[I_j, j]^T S[I_j, I_j]^-1 S[I_j, j]

Elements lie on chains of ``chain_length`` consecutive flat indices (the rows of a matrix view, or all of a tensor); a
*run* is ``n`` consecutive elements from flat index ``start`` on. ``bands[k, j] = S[j, j+k]``, shape ``(b + 1, n)``,
zero where ``j + k`` leaves the chain (:func:`separate_chains`) and never read where it leaves the run. Those zeros are
all that separates chains: an element without a coupling gets a zero in ``L``, so :func:`factor` and :func:`apply` need
not be told where chains end.

Everything is elementwise over ``n``: unrolled over ``b``, never a matrix per element, no data-dependent control flow
for ``b <= 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def halo(bandwidth: int) -> tuple[int, int]:
    """Elements a run must hold left and right of those whose direction is wanted, to get them as in the uncut chain.

    ``apply`` reaches ``b`` to the left, and every factor ``b`` to the right. Edge removal reaches ``b - 1`` further:
    whether ``j`` keeps its edge to ``j + b`` depends on whether ``j + b - 1`` was cut off, which its own window says.
    With ``gamma = 0`` and positive definite statistics nothing is cut off, and ``b`` on both sides is enough.
    """
    return bandwidth, max(bandwidth, 2 * bandwidth - 1)


def separate_chains(bands: Tensor, start: int, chain_length: int) -> None:
    """Zero, in place, every coupling in ``bands`` of shape ``(b + 1, n)`` that leaves its chain.

    Strided writes to ``b n / chain_length`` elements: a mask over ``n`` would cost as much as the statistics.
    """
    for distance in range(1, bands.shape[0]):
        for remaining in range(min(distance, chain_length)):
            bands[distance, (chain_length - 1 - remaining - start) % chain_length :: chain_length] = 0


def chain_peaks(bands: Tensor, start: int, chain_length: int) -> Tensor:
    """Largest diagonal element of every chain the run touches, in order: ``(chains,)``.

    Where a run holds part of a chain, this is the peak of that part: reduce the first and the last with the ranks that
    hold the rest before use.
    """
    diagonal = bands[0]
    n = diagonal.shape[0]
    head = min((-start) % chain_length, n)
    whole = (n - head) // chain_length
    pieces = []
    if head:
        pieces.append(diagonal[:head].amax().view(1))
    if whole:
        pieces.append(diagonal[head : head + whole * chain_length].view(whole, chain_length).amax(1))
    if head + whole * chain_length < n:
        pieces.append(diagonal[head + whole * chain_length :].amax().view(1))
    return torch.cat(pieces) if pieces else diagonal.new_zeros(0)


def expand_chains(values: Tensor, n: int, start: int, chain_length: int, *, out: Tensor | None = None) -> Tensor:
    """One value per chain, ``(chains,)`` as :func:`chain_peaks` returns them, repeated for each element: ``(n,)``."""
    if values.numel() == 1 and out is None:
        return values.expand(n)
    result = values.new_empty(n) if out is None else out
    head = min((-start) % chain_length, n)
    whole = (n - head) // chain_length
    first, middle = (1 if head else 0), head + whole * chain_length
    result[:head] = values[:first]
    result[head:middle].view(whole, chain_length).copy_(values[first : first + whole, None])
    result[middle:] = values[first + whole :]
    return result


def buffer_rows(bandwidth: int) -> int:
    """Rows of the buffer of :func:`factor`, each of the run's length."""
    return 2 * bandwidth + 7


def factor(
    bands: Tensor, ridge: Tensor | float, gamma: float = 0.0, *, buffer: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factor the banded LogDet solution of ``S + ridge I`` in the dtype of ``bands``.

    Stable edge removal: where ``1/D_j <= gamma S[j, j]`` the chain is cut between ``j`` and ``j + 1`` (the upward edges
    of ``j`` go, and those that straddle it; its edges to the left stay) and the smaller graph is solved again. A cut
    can only raise the other ``1/D``, so once is enough.

    Args:
        bands: ``(b + 1, n)``, zero where a coupling leaves its chain.
        ridge: added to the diagonal, in the units of ``bands``: a number, 0-dim or ``(n,)``.
        gamma: relative threshold of the edge removal, of the diagonal with its ridge.
        buffer: ``(buffer_rows(b), n)``, overwritten; the results are views of it. On a CPU a fresh array costs ten
            times what is computed in it, so callers that work in pieces bring one.

    Returns:
        ``lower`` of shape ``(b, n)`` with ``lower[k - 1, j] = L[j + k, j]``, and ``1/D`` of shape ``(n,)``: always
        positive, even where statistics and ridge are zero.
    """
    bandwidth, n = bands.shape[0] - 1, bands.shape[1]
    if buffer is None:
        buffer = bands.new_empty(buffer_rows(bandwidth), n)
    lower, inverse_diagonal, diagonal = buffer[:bandwidth], buffer[bandwidth], buffer[bandwidth + 1]
    workspace = buffer[bandwidth + 2 :]
    # a ridge that is never quite zero costs nothing, and makes a chain that never saw a gradient regular
    tiny = torch.finfo(bands.dtype).tiny
    if isinstance(ridge, Tensor) and ridge.ndim:
        diagonal.copy_(ridge).clamp_min_(tiny).add_(bands[0])
    elif isinstance(ridge, Tensor):
        torch.add(bands[0], ridge.to(bands.dtype).clamp_min(tiny), out=diagonal)
    else:
        torch.add(bands[0], max(float(ridge), tiny), out=diagonal)
    if min(bandwidth, n - 1) < 1:
        return lower.zero_(), diagonal
    if bandwidth == 1:
        _solve_tridiagonal(diagonal, bands[1], gamma, lower[0], inverse_diagonal, workspace)
        return lower, inverse_diagonal
    _eliminate(diagonal, bands, lower, inverse_diagonal, workspace)
    threshold = torch.mul(diagonal, gamma, out=workspace[0])
    keep = torch.gt(inverse_diagonal, threshold, out=workspace[1])
    # the host may look before it solves again; on a device, and for a compiler, looking costs more than solving
    look = bands.device.type == "cpu" and not torch.compiler.is_compiling()
    if not look or not bool(keep.amin() > 0):
        _eliminate(diagonal, cut_chains(bands, keep), lower, inverse_diagonal, workspace)
    return lower, inverse_diagonal


def _solve_tridiagonal(
    diagonal: Tensor, coupling: Tensor, gamma: float, lower: Tensor, inverse_diagonal: Tensor, workspace: Tensor
) -> None:
    """Closed form for ``b = 1``: ``L[j+1, j] = -e_j / d_{j+1}``, ``1/D_j = d_j - e_j^2 / d_{j+1}``.

    The gate is a 0 or 1 in floating point: a boolean array and ``where`` take ten times as long on a CPU.
    """
    gate = workspace[0]
    torch.div(coupling[:-1], diagonal[1:], out=lower[:-1])
    lower[-1:].zero_()
    torch.addcmul(diagonal, lower, coupling, value=-1, out=inverse_diagonal)
    torch.mul(diagonal, gamma, out=gate)
    torch.gt(inverse_diagonal, gate, out=gate)
    lower.mul_(gate)
    torch.addcmul(diagonal, lower, coupling, value=-1, out=inverse_diagonal)
    lower.neg_()


def cut_chains(bands: Tensor, keep: Tensor) -> Tensor:
    """Copy of ``bands``, ``(b + 1, n)``, cut between ``j`` and ``j + 1`` wherever ``keep[j]``, ``(n,)``, is zero."""
    remaining = bands.clone()
    connected = keep = keep.to(bands.dtype)
    for distance in range(1, min(bands.shape[0], bands.shape[1])):
        if distance > 1:
            # j .. j + distance stay connected if j .. j + distance - 1 do and j + distance - 1 is not cut off
            connected = connected[:-1] * keep[distance - 1 :]
        remaining[distance, : connected.shape[0]].mul_(connected)
    return remaining


def _eliminate(diagonal: Tensor, bands: Tensor, lower: Tensor, inverse_diagonal: Tensor, workspace: Tensor) -> None:
    """Solve all windows at once by recursion over the window's length: ``O(b^2)`` operations per element.

    ``upward[i - 1, j]`` are the coefficients that predict ``j`` from ``j + i``, ``i = 1..m``, with residual variance
    ``up[j]``; ``downward[i - 1, j + m]`` predict the far end ``j + m`` from ``j + m - i`` with residual variance
    ``down[j + m]``. The partial covariance of both ends given what is between extends both by one element, in place.
    At ``m = b``, ``L[j + i, j] = -upward[i - 1, j]`` and ``1/D = up``: the elimination of S[I_j, I_j] with the work of
    neighbouring windows shared.

    Residuals are held above rounding noise: a window with a smaller one is singular to working precision, so it holds
    a vertex that edge removal cuts off before it is solved again.
    """
    bandwidth, n = lower.shape[0], diagonal.shape[0]
    upward, up = lower.zero_(), inverse_diagonal.copy_(diagonal)
    noise, down, partial, factors, spare = workspace[:5]
    downward = workspace[5:]
    torch.mul(diagonal, torch.finfo(diagonal.dtype).eps, out=noise)
    down.copy_(diagonal)
    for length in range(1, min(bandwidth, n - 1) + 1):
        size = n - length
        covariance, new, temporary = partial[:size], factors[:size], spare[:size]
        covariance.copy_(bands[length, :size])
        for between in range(1, length):
            beyond = bands[length - between, between : between + size]
            covariance.addcmul_(upward[between - 1, :size], beyond, value=-1)
        torch.div(covariance, down[length:], out=upward[length - 1, :size])
        last = length == bandwidth
        if not last:
            torch.div(covariance, up[:size], out=new)
            downward[length - 1, length:].copy_(new)
        for i in range(length - 1):
            near, far = upward[i, :size], downward[length - 2 - i, length:]
            if last:
                near.addcmul_(upward[length - 1, :size], far, value=-1)
                continue
            temporary.copy_(near)
            near.addcmul_(upward[length - 1, :size], far, value=-1)
            far.addcmul_(new, temporary, value=-1)
        if not last:
            down[length:].addcmul_(new, covariance, value=-1)
            torch.maximum(down, noise, out=down)
        up[:size].addcmul_(upward[length - 1, :size], covariance, value=-1)
        torch.maximum(up, noise, out=up)
    lower.neg_()


def apply(
    lower: Tensor, inverse_diagonal: Tensor, vector: Tensor, *, out: Tensor | None = None, spare: Tensor | None = None
) -> Tensor:
    """Return ``u = L D L^T vector`` by two stencil passes; shapes ``(b, n)``, ``(n,)``, ``(n,)``.

    ``u_j`` needs ``vector[j - b .. j + b]`` and the factors of ``j - b .. j``. Of a run cut out of a chain,
    the elements at least :func:`halo` from the cut ends are those of the uncut chain; the outer ones are not.

    Args:
        out, spare: ``(n,)``, overwritten: the result, and a workspace. Neither is another argument.
    """
    n = vector.shape[0]
    inner = torch.empty_like(vector) if spare is None else spare
    result = torch.empty_like(vector) if out is None else out
    reach = min(lower.shape[0], n - 1)
    if reach < 1:
        return torch.div(vector, inverse_diagonal, out=result)
    # the first neighbour's pass writes where the others add: no copy
    torch.addcmul(vector[:-1], lower[0, :-1], vector[1:], out=inner[:-1])
    inner[-1:].copy_(vector[-1:])
    for distance in range(2, reach + 1):
        inner[: n - distance].addcmul_(lower[distance - 1, : n - distance], vector[distance:])
    inner.div_(inverse_diagonal)
    torch.addcmul(inner[1:], lower[0, :-1], inner[:-1], out=result[1:])
    result[:1].copy_(inner[:1])
    for distance in range(2, reach + 1):
        result[distance:].addcmul_(lower[distance - 1, : n - distance], inner[: n - distance])
    return result
