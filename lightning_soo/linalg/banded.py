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


def expand_chains(values: Tensor, n: int, start: int, chain_length: int) -> Tensor:
    """One value per chain, ``(chains,)`` as :func:`chain_peaks` returns them, repeated for each element: ``(n,)``."""
    if values.numel() == 1:
        return values.expand(n)
    offset = start % chain_length
    return values.view(-1, 1).expand(-1, chain_length).reshape(-1)[offset : offset + n]


def factor(bands: Tensor, ridge: Tensor | float, gamma: float = 0.0) -> tuple[Tensor, Tensor]:
    """Factor the banded LogDet solution of ``S + ridge I`` in the dtype of ``bands``.

    Stable edge removal: where ``1/D_j <= gamma S[j, j]`` the chain is cut between ``j`` and ``j + 1`` (the upward edges
    of ``j`` go, and those that straddle it; its edges to the left stay) and the smaller graph is solved again. A cut
    can only raise the other ``1/D``, so once is enough.

    Args:
        bands: ``(b + 1, n)``, zero where a coupling leaves its chain.
        ridge: added to the diagonal, in the units of ``bands``: a number, 0-dim or ``(n,)``.
        gamma: relative threshold of the edge removal, of the diagonal with its ridge.

    Returns:
        ``lower`` of shape ``(b, n)`` with ``lower[k - 1, j] = L[j + k, j]``, and ``1/D`` of shape ``(n,)``: positive,
        at least the smallest normal number even where statistics and ridge are zero.
    """
    # a ridge that is never quite zero costs nothing, and makes a chain that never saw a gradient regular
    floor = torch.finfo(bands.dtype).tiny
    if isinstance(ridge, Tensor):
        diagonal = bands[0] + ridge.to(bands.dtype).clamp_min(floor)
    else:
        diagonal = bands[0] + max(float(ridge), floor)
    bandwidth = min(bands.shape[0], bands.shape[1]) - 1
    if bandwidth < 1:
        return bands.new_zeros(bands.shape[0] - 1, bands.shape[1]), diagonal
    if bands.shape[0] == 2:
        return _factor_tridiagonal(diagonal, bands[1], gamma)
    lower, inverse_diagonal = _eliminate(diagonal, bands, bandwidth)
    keep = inverse_diagonal > gamma * diagonal
    # the host may look before it solves again; on a device, and for a compiler, looking costs more than solving
    look = bands.device.type == "cpu" and not torch.compiler.is_compiling()
    if not look or not bool(keep.all()):
        lower, inverse_diagonal = _eliminate(diagonal, cut_chains(bands, keep), bandwidth)
        inverse_diagonal = torch.where(inverse_diagonal > gamma * diagonal, inverse_diagonal, diagonal)
    return lower, inverse_diagonal


def _factor_tridiagonal(diagonal: Tensor, coupling: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Closed form for ``b = 1``: ``L[j+1, j] = -e_j / d_{j+1}``, ``1/D_j = d_j - e_j^2 / d_{j+1}``."""
    lower = torch.zeros_like(diagonal)
    lower[:-1] = coupling[:-1] / diagonal[1:]
    residual = diagonal - lower * coupling
    keep = residual > gamma * diagonal
    return torch.where(keep, -lower, 0.0).unsqueeze(0), torch.where(keep, residual, diagonal)


def cut_chains(bands: Tensor, keep: Tensor) -> Tensor:
    """Copy of ``bands``, ``(b + 1, n)``, cut between ``j`` and ``j + 1`` wherever ``keep[j]``, ``(n,)``, is false."""
    remaining = bands.clone()
    connected = keep
    for distance in range(1, bands.shape[0]):
        if distance > 1:
            # j .. j + distance stay connected if j .. j + distance - 1 do and j + distance - 1 is not cut off
            connected = connected[:-1] & keep[distance - 1 :]
        remaining[distance, : connected.shape[0]].mul_(connected)
    return remaining


def _eliminate(diagonal: Tensor, bands: Tensor, bandwidth: int) -> tuple[Tensor, Tensor]:
    """Solve all windows at once by recursion over the window's length: ``O(b^2)`` operations per element.

    ``upward[i - 1]`` are the coefficients that predict ``j`` from ``j + i``, ``i = 1..m``, with residual variance
    ``up``; ``downward[i - 1]`` predict the far end ``j + m`` from ``j + m - i`` with residual variance ``down``. The
    partial covariance of both ends given what is between extends both by one element. At ``m = b``,
    ``L[j + i, j] = -upward[i - 1, j]`` and ``1/D = up``: the elimination of S[I_j, I_j] with the work of neighbouring
    windows shared.

    A prediction from an element whose residual is rounding noise is left out. Its window is singular to working
    precision, so it holds a vertex that edge removal cuts off before it is solved again.
    """
    n = diagonal.shape[0]
    noise = torch.finfo(bands.dtype).eps * diagonal
    lower = bands.new_zeros(bands.shape[0] - 1, n)
    up, down = diagonal.clone(), diagonal
    upward: list[Tensor] = []
    downward: list[Tensor] = []
    for length in range(1, bandwidth + 1):
        size = n - length
        partial = bands[length, :size].clone()
        for between in range(1, length):
            partial.addcmul_(upward[between - 1][:size], bands[length - between, between : between + size], value=-1)
        far, near = down[1 : size + 1], up[:size]
        from_far = torch.where(far > noise[length:], partial / far, 0.0)
        from_near = torch.where(near > noise[:size], partial / near, 0.0)
        previous = [coefficients[1 : size + 1] for coefficients in downward]
        if length < bandwidth:
            downward = [
                torch.addcmul(previous[i], from_near, upward[length - 2 - i][:size], value=-1)
                for i in range(length - 1)
            ]
            downward.append(from_near)
            down = torch.addcmul(far, from_near, partial, value=-1)
        for i in range(length - 1):
            upward[i][:size].addcmul_(from_far, previous[length - 2 - i], value=-1)
        upward.append(lower[length - 1])
        upward[-1][:size] = from_far
        up[:size].addcmul_(from_far, partial, value=-1)
    return lower.neg_(), up


def apply(lower: Tensor, inverse_diagonal: Tensor, vector: Tensor) -> Tensor:
    """Return ``u = L D L^T vector`` by two stencil passes; shapes ``(b, n)``, ``(n,)``, ``(n,)``.

    ``u_j`` needs ``vector[j - b .. j + b]`` and the factors of ``j - b .. j``. Of a run cut out of a chain,
    the elements at least :func:`halo` from the cut ends are those of the uncut chain; the outer ones are not.
    """
    n = vector.shape[0]
    inner = vector.clone()
    for distance in range(1, min(lower.shape[0], n - 1) + 1):
        inner[: n - distance].addcmul_(lower[distance - 1, : n - distance], vector[distance:])
    inner.div_(inverse_diagonal)
    result = inner.clone()
    for distance in range(1, min(lower.shape[0], n - 1) + 1):
        result[distance:].addcmul_(lower[distance - 1, : n - distance], inner[: n - distance])
    return result
