"""Triton's kernels of SONew's step, launched by :mod:`lightning_soo.preconditioners.banded_triton`.

The mathematics is that of :mod:`lightning_soo.linalg.banded` with at most one neighbour (Devvrit et al. 2023, arXiv
2311.10085), which tests hold this against. The table has one row of ``WIDTH`` numbers for each run. As int64: gradient,
momentum, bands, ridge, n, start in its chain, chain length, stride of the bands, owned begin, owned end; as float64:
the momentum's weight of a gradient, decay, weight, scale, graft_eps, factor of the ridge, gamma.
"""

from __future__ import annotations

import triton
import triton.language as tl

WIDTH = tl.constexpr(17)
HALO = tl.constexpr(8)  # left gradient, momentum, diagonal and coupling; right gradient, momentum, diagonal; unused
# smallest normal number: a chain without a gradient stays regular; a smaller literal would turn everything to float64
_TINY = tl.constexpr(2.0**-126)
_FAR = tl.constexpr(1 << 20)  # beyond any tile, so that what is left of a long run fits 32 bits


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(value, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to ``DTYPE``, to nearest even; by hand for bfloat16, where the interpreter cuts off."""
    if tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _advance(  # type: ignore[no-untyped-def]
    raw, moment, diagonal, complement, decay, weight, scale, DTYPE: tl.constexpr
):
    """Scaled gradient, new momentum and new second moment."""
    value = raw * scale
    filtered = _rounded(moment + complement * (raw - moment), DTYPE).to(tl.float32)
    return value, filtered, diagonal * decay + weight * value * value


@triton.jit
def _solve(edge, here, there, filtered, following, gamma):  # type: ignore[no-untyped-def]
    """``psi_j = e_j / d_{j+1}``, zero where the edge is removed, and ``(D L^T m)_j``; 1/D_j = d_j - psi_j e_j."""
    psi = edge / there
    residual = here - psi * edge
    keep = residual > gamma * here
    psi = tl.where(keep, psi, 0.0)
    return psi, (filtered - psi * following) / tl.where(keep, residual, here)


@triton.jit  # type: ignore[untyped-decorator]
def set_aside(  # type: ignore[no-untyped-def]
    table, programs, halos, PIECE: tl.constexpr, DTYPE: tl.constexpr, GIVEN: tl.constexpr, COUPLED: tl.constexpr
):
    """Of a piece of a long chain: the old elements on both sides, and its part in the chain's largest diagonal."""
    program = tl.program_id(0).to(tl.int64)
    fields = table + tl.load(programs + 2 * program) * WIDTH
    position = tl.load(programs + 2 * program + 1)
    gradient = tl.load(fields).to(tl.pointer_type(DTYPE))
    momentum = tl.load(fields + 1).to(tl.pointer_type(DTYPE))
    diagonal = tl.load(fields + 2).to(tl.pointer_type(tl.float32))
    n, base, length, stride = tl.load(fields + 4), tl.load(fields + 5), tl.load(fields + 6), tl.load(fields + 7)
    chain = position // length
    column, first = position - chain * length, position - base
    before, after = first - 1, first + PIECE
    if COUPLED:
        left, right = (column > 0) & (before >= 0), (column + PIECE < length) & (after < n)
        halo = halos + program * HALO
        tl.store(halo, tl.load(gradient + before, mask=left, other=0.0).to(tl.float32))
        tl.store(halo + 1, tl.load(momentum + before, mask=left, other=0.0).to(tl.float32))
        tl.store(halo + 2, tl.load(diagonal + before, mask=left, other=0.0))
        tl.store(halo + 3, tl.load(diagonal + stride + before, mask=left, other=0.0))
        tl.store(halo + 4, tl.load(gradient + after, mask=right, other=0.0).to(tl.float32))
        tl.store(halo + 5, tl.load(momentum + after, mask=right, other=0.0).to(tl.float32))
        tl.store(halo + 6, tl.load(diagonal + after, mask=right, other=0.0))
    if not GIVEN:
        at = first + tl.arange(0, PIECE)
        inside = (at >= 0) & (at < n) & (column + tl.arange(0, PIECE) < length)
        peak = tl.max(tl.load(diagonal + at, mask=inside, other=0.0), axis=0)
        # numbers that are not negative have the order of their bits, and a maximum does not depend on who comes first
        peaks = tl.load(fields + 3).to(tl.pointer_type(tl.int32))
        tl.atomic_max(peaks + chain, peak.to(tl.int32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator]
def step(  # type: ignore[no-untyped-def]
    table, numbers, programs, halos, sums,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
    CUT: tl.constexpr, GIVEN: tl.constexpr, COUPLED: tl.constexpr,
):  # fmt: skip
    """The step of ``ROWS`` chains of at most ``COLUMNS`` elements, or of ``COLUMNS`` elements of a longer chain."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(programs + 2 * program) * WIDTH
    position = tl.load(programs + 2 * program + 1)
    fields, options = table + index, numbers + index
    n, base, length = tl.load(fields + 4), tl.load(fields + 5), tl.load(fields + 6)
    chain, first = position // length, position - base
    column = position - chain * length  # 0 but in a piece
    gradient = tl.load(fields).to(tl.pointer_type(DTYPE)) + first
    momentum = tl.load(fields + 1).to(tl.pointer_type(DTYPE)) + first
    diagonal = tl.load(fields + 2).to(tl.pointer_type(tl.float32)) + first
    coupling = diagonal + tl.load(fields + 7)
    complement, decay = tl.load(options + 10).to(tl.float32), tl.load(options + 11).to(tl.float32)
    weight, scale = tl.load(options + 12).to(tl.float32), tl.load(options + 13).to(tl.float32)
    graft_eps, factor = tl.load(options + 14).to(tl.float32), tl.load(options + 15).to(tl.float32)
    gamma = tl.load(options + 16).to(tl.float32)

    # from here on offsets are those from `first`, in 32 bits
    room = tl.minimum(length - column, _FAR).to(tl.int32)
    begin, end = tl.maximum(-first, -1).to(tl.int32), tl.minimum(n - first, _FAR).to(tl.int32)
    row, along = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = row * room + along
    valid = (along < room) & (at >= begin) & (at < end)
    raw = tl.load(gradient + at, mask=valid, other=0.0).to(tl.float32)
    moment = tl.load(momentum + at, mask=valid, other=0.0).to(tl.float32)
    old = tl.load(diagonal + at, mask=valid, other=0.0)
    if COUPLED:
        left = valid & ((along > 0) | (column > 0)) & (at > begin)
        right = valid & (along + 1 < room) & (at + 1 < end)
        near, beyond = left, right
        if CUT:  # the outer neighbours may have been overwritten
            near, beyond = left & (along > 0), right & (along < COLUMNS - 1)
        left_raw = tl.load(gradient + at - 1, mask=near, other=0.0).to(tl.float32)
        left_moment = tl.load(momentum + at - 1, mask=near, other=0.0).to(tl.float32)
        left_old = tl.load(diagonal + at - 1, mask=near, other=0.0)
        left_edge = tl.load(coupling + at - 1, mask=near, other=0.0)
        right_raw = tl.load(gradient + at + 1, mask=beyond, other=0.0).to(tl.float32)
        right_moment = tl.load(momentum + at + 1, mask=beyond, other=0.0).to(tl.float32)
        right_old = tl.load(diagonal + at + 1, mask=beyond, other=0.0)
        edge = tl.load(coupling + at, mask=right, other=0.0)
        if CUT:
            halo, outer = halos + program * HALO, along == 0
            left_raw = tl.where(outer, tl.load(halo), left_raw)
            left_moment = tl.where(outer, tl.load(halo + 1), left_moment)
            left_old = tl.where(outer, tl.load(halo + 2), left_old)
            left_edge = tl.where(outer, tl.load(halo + 3), left_edge)
            outer = along == COLUMNS - 1
            right_raw = tl.where(outer, tl.load(halo + 4), right_raw)
            right_moment = tl.where(outer, tl.load(halo + 5), right_moment)
            right_old = tl.where(outer, tl.load(halo + 6), right_old)

    if GIVEN:
        ridges = tl.load(fields + 3).to(tl.pointer_type(tl.float32))
        known = (chain + row) * length < base + n
        ridge = tl.load(ridges + chain + row, mask=known, other=0.0) * factor
    else:
        ridge = tl.max(old, axis=1, keep_dims=True) * factor
    ridge = tl.maximum(ridge, _TINY)
    value, filtered, second = _advance(raw, moment, old, complement, decay, weight, scale, DTYPE)
    here = second + ridge
    if COUPLED:
        left_value, left_filtered, left_second = _advance(
            left_raw, left_moment, left_old, complement, decay, weight, scale, DTYPE
        )
        right_value, right_filtered, right_second = _advance(
            right_raw, right_moment, right_old, complement, decay, weight, scale, DTYPE
        )
        left_edge = tl.where(left, left_edge * decay + weight * left_value * value, 0.0)
        edge = tl.where(right, edge * decay + weight * value * right_value, 0.0)
        left_psi, left_inner = _solve(left_edge, left_second + ridge, here, left_filtered, filtered, gamma)
        _psi, inner = _solve(edge, here, right_second + ridge, filtered, right_filtered, gamma)
        direction = inner - left_psi * left_inner
    else:
        direction = filtered / here

    tl.debug_barrier()  # what is stored here, other threads have loaded as their neighbour
    tl.store(gradient + at, _rounded(direction, DTYPE), mask=valid)
    tl.store(momentum + at, _rounded(filtered, DTYPE), mask=valid)
    tl.store(diagonal + at, second, mask=valid)
    if COUPLED:  # of a chain's last element 0; a run's last may have a neighbour: its coupling stands still
        tl.store(coupling + at, edge, mask=right | (valid & (along + 1 == room)))
    # in float64, for squares of extreme gradients: two products beside 32 bytes, which take longer even where float64
    # has 1/64 of the float32 rate. One sum for each program: atomic additions would differ from run to run.
    own_begin = tl.maximum(tl.load(fields + 8) - first, -1).to(tl.int32)
    own_end = tl.minimum(tl.load(fields + 9) - first, _FAR).to(tl.int32)
    owned = valid & (at >= own_begin) & (at < own_end)
    moved = tl.where(owned, direction, 0.0).to(tl.float64)
    graft = tl.where(owned, filtered / (tl.sqrt(second) + graft_eps), 0.0).to(tl.float64)
    tl.store(sums + 2 * program, tl.sum(tl.sum(moved * moved, axis=1), axis=0))
    tl.store(sums + 2 * program + 1, tl.sum(tl.sum(graft * graft, axis=1), axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def add_up(sums, spans, totals, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each run the sums of its programs, in a fixed order."""
    run = tl.program_id(0)
    first, count = tl.load(spans + 2 * run), tl.load(spans + 2 * run + 1)
    moved, graft = tl.zeros((BLOCK,), dtype=tl.float64), tl.zeros((BLOCK,), dtype=tl.float64)
    at = tl.arange(0, BLOCK)
    done = 0
    while done < count:
        inside = done + at < count
        moved += tl.load(sums + 2 * (first + done + at), mask=inside, other=0.0)
        graft += tl.load(sums + 2 * (first + done + at) + 1, mask=inside, other=0.0)
        done += BLOCK
    tl.store(totals + 2 * run, tl.sum(moved, axis=0))
    tl.store(totals + 2 * run + 1, tl.sum(graft, axis=0))
