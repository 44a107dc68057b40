"""SONew's state of one parameter on one rank: bands beside the moments, and a halo where sharding cuts a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_soo.optim.members import Member
from lightning_soo.placement.chains import Halos, Strip
from lightning_soo.placement.fragments import to_local
from lightning_soo.transport import Transport


@dataclass
class Run:
    """What is known of one parameter's statistics beside their elements; the same on every rank.

    Attributes:
        scale, peak, observations: as :class:`~lightning_soo.preconditioners.banded.BandedStatistics` has them.
        weight: sum of the weights of all gradients seen, ``1 - b2^t``.
    """

    scale: float = 1.0
    peak: float = 0.0
    observations: int = 0
    weight: float = 0.0


def band_names(bandwidth: int) -> list[str]:
    """Names of the bands in the optimizer's state: the diagonal, the first neighbours, ..."""
    return [f"band_{distance}" for distance in range(bandwidth + 1)]


def band_buffer(tensor: Tensor, state: dict[str, Any], bandwidth: int, dtype: torch.dtype) -> Tensor:
    """The bands of an optimizer tensor as one ``(b + 1, n)``, ``n`` its local elements.

    Each row is a parameter-shaped entry of ``state``, so that every engine saves it like a moment. Rows that a
    checkpoint has replaced are taken into one buffer again.
    """
    local = to_local(tensor)
    size, names = local.numel(), band_names(bandwidth)
    rows = [to_local(state[name]) for name in names if name in state]
    first = rows[0] if len(rows) == len(names) else None
    if first is not None and all(
        row.dtype == dtype
        and row.is_contiguous()
        and row.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and row.storage_offset() == first.storage_offset() + size * distance
        for distance, row in enumerate(rows)
    ):
        return first.as_strided((len(names), size), (size, 1), first.storage_offset())
    buffer = torch.zeros(len(names), size, dtype=dtype, device=local.device)
    for distance, name in enumerate(names):
        if name in state:
            buffer[distance].copy_(to_local(state[name]).reshape(-1))
        state[name] = _like(tensor, buffer[distance].view(local.shape))
    return buffer


def _like(tensor: Tensor, local: Tensor) -> Tensor:
    """``local`` as this rank's part of a tensor that is distributed as ``tensor``."""
    if not hasattr(tensor, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        tensor.device_mesh,  # type: ignore[attr-defined]
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def exchange_halos(
    transport: Transport, halos: Halos, members: Sequence[Member], rows: Mapping[int, Tensor], count: int
) -> dict[int, list[tuple[Strip, Tensor]]]:
    """Give every rank its neighbours' elements at the cuts. Collective.

    Args:
        rows: member number -> ``(count, n)`` of its fragment, one dtype for all; a missing one sends zeros.

    Returns:
        Member number -> strips with their ``(count, size)``.
    """
    place, places = transport.rank, range(transport.size)
    dtype, device = next(((r.dtype, r.device) for r in rows.values()), (torch.float32, torch.device("cpu")))
    sent = [sum(strip.stop - strip.start for strip in halos.strips[place][to]) * count for to in places]
    received = [sum(strip.stop - strip.start for strip in halos.strips[of][place]) * count for of in places]
    flat = torch.zeros(sum(sent), dtype=dtype, device=device)
    position = 0
    for to in places:
        for strip in halos.strips[place][to]:
            size = strip.stop - strip.start
            if strip.parameter in rows:
                begin = strip.start - members[strip.parameter].fragment.start
                piece = rows[strip.parameter][:, begin : begin + size]
                flat[position : position + count * size].view(count, size).copy_(piece)
            position += count * size
    arrived = transport.start_exchange(flat, sent, received, "the neighbours at cuts").wait()
    found: dict[int, list[tuple[Strip, Tensor]]] = {}
    position = 0
    for of in places:
        for strip in halos.strips[of][place]:
            size = strip.stop - strip.start
            found.setdefault(strip.parameter, []).append(
                (strip, arrived[position : position + count * size].view(count, size))
            )
            position += count * size
    return found
