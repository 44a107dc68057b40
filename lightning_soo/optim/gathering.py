"""Statistics on their way to the ranks that refresh, and roots on their way to the ranks that apply them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soo.optim.outcomes import (
    Outcome,
    array_templates,
    message_size,
    pack,
    pack_array,
    unpack,
    unpack_array,
)
from lightning_soo.placement.blocks import ArrayLayout
from lightning_soo.placement.homes import Place
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.transport import Transport, pack_bytes, template_size, unpack_bytes

BlockLayout = Callable[[str], tuple[tuple[ArrayLayout, ...], torch.dtype]]


@dataclass(kw_only=True)
class InFlight:
    """A refresh between its start and its swap; the same list on every rank.

    Attributes:
        own: the refresher's outcome, once it has asked for it; always None on other ranks.
        delivered: the outcome, once every rank has it: received, or restored from a checkpoint.
    """

    key: str
    started: int
    swap: int
    own: Outcome | None = None
    delivered: Outcome | None = None

    @property
    def known(self) -> Outcome | None:
        """The outcome as far as this rank has it."""
        return self.delivered or self.own


class Gathering:
    """Roots under way from their refreshers to their homes; every rank learns whether each refresh succeeded.

    Where every rank is a home of everything (DDP) one broadcast per refresher is cheapest; else each rank gets the
    headers of all outcomes and the roots of its own blocks.
    """

    def __init__(
        self, transport: Transport, entries: Sequence[InFlight], places: Mapping[str, Place], layout: BlockLayout
    ) -> None:
        self._rank, self._entries, self._places, self._layout = transport.rank, entries, places, layout
        ranks = range(transport.size)
        if all(len(places[entry.key].homes) == transport.size for entry in entries):
            sizes = [self._size(owner, self._rank) for owner in ranks]
            own = pack_bytes(self._packed(self._rank)) if sizes[self._rank] else None
            self._broadcast = transport.start_broadcast_from_owners(sizes, own, "the roots")
            self._sizes, self._exchange = sizes, None
            return
        packed = [pack_bytes(self._packed(to)) if to != self._rank else None for to in ranks]
        parts = [part for part in packed if part is not None]
        self._sizes = [self._size(owner, self._rank) if owner != self._rank else 0 for owner in ranks]
        self._exchange = transport.start_exchange(
            torch.cat(parts), [0 if part is None else part.numel() for part in packed], self._sizes, "the roots"
        )

    def finish(self) -> None:
        """Wait, and give every entry its outcome."""
        if self._exchange is not None:
            flats: Sequence[Tensor] = torch.split(self._exchange.wait(), self._sizes)
        else:
            flats = self._broadcast.wait()
        positions = [0] * len(flats)
        for entry in self._entries:
            owner, layout = self._places[entry.key].refresher, self._layout(entry.key)
            if entry.own is not None:
                entry.delivered = entry.own
                continue
            with_roots = self._is_home(entry.key, self._rank)
            length = message_size(*layout, with_roots=with_roots)
            part = flats[owner][positions[owner] : positions[owner] + length]
            entry.delivered = unpack(part, *layout, owner, with_roots=with_roots)
            positions[owner] += length

    def _is_home(self, key: str, rank: int) -> bool:
        return rank in self._places[key].homes

    def _of(self, owner: int) -> list[InFlight]:
        return [entry for entry in self._entries if self._places[entry.key].refresher == owner]

    def _size(self, owner: int, to: int) -> int:
        return sum(
            message_size(*self._layout(entry.key), with_roots=self._is_home(entry.key, to)) for entry in self._of(owner)
        )

    def _packed(self, to: int) -> list[Tensor]:
        packed: list[Tensor] = []
        for entry in self._of(self._rank):
            assert entry.own is not None
            packed += pack(entry.own, *self._layout(entry.key), with_roots=self._is_home(entry.key, to))
        return packed


def exchange_statistics(
    transport: Transport, blocks: Mapping[str, KroneckerBlock], away: Sequence[tuple[str, Place]]
) -> dict[str, KroneckerStatistics]:
    """Send statistics from the ranks that keep them to the ranks that refresh them. Collective.

    Returns:
        Key -> statistics, of the blocks that this rank refreshes for others.
    """
    rank, size = transport.rank, transport.size
    sent, received = [0] * size, [0] * size
    packed: list[list[Tensor]] = [[] for _ in range(size)]
    for key, place in away:
        block = blocks[key]
        length = template_size(_statistics_templates(block))
        if place.keeper == rank:
            assert block.statistics is not None
            header = torch.tensor([block.statistics.scale, block.statistics.peak], dtype=torch.float64)
            layouts = block.statistics_layouts(block.block)
            matrices = zip(block.statistics.matrices, layouts, strict=True)
            packed[place.refresher] += [header, *(pack_array(matrix, layout) for matrix, layout in matrices)]
            sent[place.refresher] += length
        if place.refresher == rank:
            received[place.keeper] += length
    flat = pack_bytes([tensor for part in packed for tensor in part])
    parts = torch.split(transport.start_exchange(flat, sent, received, "the statistics").wait(), received)
    found, positions = {}, [0] * size
    for key, place in away:
        if place.refresher != rank:
            continue
        block = blocks[key]
        templates = _statistics_templates(block)
        start = positions[place.keeper]
        positions[place.keeper] += template_size(templates)
        header, *halves = unpack_bytes(parts[place.keeper][start : positions[place.keeper]], templates)
        layouts = block.statistics_layouts(block.block)
        whole = [unpack_array(half, layout) for half, layout in zip(halves, layouts, strict=True)]
        found[key] = KroneckerStatistics(whole, scale=float(header[0]), peak=float(header[1]))
    return found


def _statistics_templates(block: KroneckerBlock) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((2,), torch.float64), *array_templates(block.statistics_layouts(block.block), block.statistics_dtype)]
