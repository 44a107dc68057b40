"""Which blocks of a rank are preconditioned together, and how they get from parameters into a stack and back."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_soo.optim.members import Member
from lightning_soo.placement.boxes import Box, tiled, volume
from lightning_soo.placement.exchange import Bucket
from lightning_soo.preconditioners.kronecker import KroneckerBlock
from lightning_soo.preconditioners.stacks import Stack, gains_by_stacking, kind_of

# elements of a stack, about: beyond that nothing is gained, and memory is taken
LARGEST_STACK = 2**22


@dataclass(frozen=True, eq=False)
class Tile:
    """Equal blocks of one parameter, which are one strided view: copied at once.

    Attributes:
        blocks: in row-major order of their places.
        box: what they are of the parameter together.
        counts: how many in each dimension.
    """

    member: Member
    blocks: tuple[KroneckerBlock, ...]
    box: Box
    counts: tuple[int, ...]

    def view(self, local: Tensor) -> Tensor:
        """``(*counts, *shape)`` of a contiguous local tensor of the member."""
        divided = [size for pair in zip(self.counts, self.blocks[0].block.shape, strict=True) for size in pair]
        view = self.member.view(local, self.box).view(divided)
        return view.permute(*range(0, len(divided), 2), *range(1, len(divided), 2))

    def of_stack(self, stacked: Tensor) -> Tensor:
        """The same of this tile's part of a stack."""
        return stacked.view(*self.counts, *self.blocks[0].block.shape)


class TiledStack:
    """A stack that is made of tiles."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self.tiles = tuple(tiles)
        self.stack = Stack([block for tile in tiles for block in tile.blocks])
        ends = list(itertools.accumulate(len(tile.blocks) for tile in tiles))
        self._spans = list(zip([0, *ends], ends, strict=False))

    def precondition(self, sources: Mapping[int, Tensor], targets: Mapping[int, Tensor]) -> bool:
        """Write the directions of all tiles.

        Args:
            sources, targets: ``id(member)`` -> what is preconditioned, and where the direction goes, which holds the
                gradient until then; of members that move and are contiguous.

        Returns:
            False, and nothing is done, where some of it does not move or has no roots yet.
        """
        if not all(id(tile.member) in sources for tile in self.tiles) or not self.stack.gather():
            return False
        first = self.stack.blocks[0]
        filtered = self._together(sources)
        gradient = self._together(targets) if first.needs_gradient else None
        found = self.stack.precondition(filtered, gradient, self.tiles[0].member.group)
        for tile, (start, stop) in zip(self.tiles, self._spans, strict=True):
            tile.view(targets[id(tile.member)]).copy_(tile.of_stack(found[start:stop]))
        return True

    def _together(self, tensors: Mapping[int, Tensor]) -> Tensor:
        first = self.stack.blocks[0]
        shape = (len(self.stack.blocks), *first.block.shape)
        stacked = torch.empty(shape, dtype=first.compute_dtype, device=first.device)
        for tile, (start, stop) in zip(self.tiles, self._spans, strict=True):
            tile.of_stack(stacked[start:stop]).copy_(tile.view(tensors[id(tile.member)]))
        return stacked


class Stacks:
    """Of one plan on one rank.

    Attributes:
        tiled: of blocks that lie in this rank's fragments.
        alone: ``id(member)`` -> its whole blocks that are in none of them.
    """

    def __init__(self, members: Sequence[Member] = ()) -> None:
        self.tiled: list[TiledStack] = []
        self.alone: dict[int, list[KroneckerBlock]] = {id(member): [] for member in members}
        alike: dict[Hashable, list[Tile]] = {}
        for member in members:
            found: dict[Hashable, list[KroneckerBlock]] = {}
            for block in member.whole_blocks:
                if gains_by_stacking(block):
                    found.setdefault(kind_of(block), []).append(block)
                else:
                    self.alone[id(member)].append(block)
            for kind, blocks in found.items():
                key = kind, _kind_of(member)
                alike.setdefault(key, []).extend(_tiles(member, blocks))
        for tiles in alike.values():
            for together in _within(tiles, [len(tile.blocks) * volume(tile.blocks[0].block.ranges) for tile in tiles]):
                if sum(len(tile.blocks) for tile in together) > 1:
                    self.tiled.append(TiledStack(together))
                else:
                    self.alone[id(together[0].member)] += together[0].blocks
        self._of_units: dict[int, list[Stack]] = {}

    def of_units(self, bucket: Bucket, blocks: Sequence[tuple[KroneckerBlock, Member]]) -> list[Stack]:
        """Of the blocks of a bucket that are assembled here; those that are in none of them go alone."""
        if id(bucket) not in self._of_units:
            alike: dict[Hashable, list[KroneckerBlock]] = {}
            for block, member in blocks:
                if gains_by_stacking(block):
                    alike.setdefault((kind_of(block), _kind_of(member)), []).append(block)
            self._of_units[id(bucket)] = [
                Stack(together)
                for found in alike.values()
                for together in _within(found, [volume(block.block.ranges) for block in found])
                if len(together) > 1
            ]
        return self._of_units[id(bucket)]


def _kind_of(member: Member) -> Hashable:
    """What members of one stack have in common."""
    return member.group_number, member.planned.spec.part, member.planned.spec.dtype


def _tiles(member: Member, blocks: Sequence[KroneckerBlock]) -> Iterator[Tile]:
    """Divide equal blocks of a member into as few tiles as their rows make."""
    found: list[list[KroneckerBlock]] = []
    by_row = itertools.groupby(sorted(blocks, key=lambda block: block.block.ranges), lambda b: b.block.ranges[:1])
    for row in (list(row) for _, row in by_row):
        if tiled([block.block.ranges for block in row]) is None:
            found.extend([block] for block in row)
            continue
        longer = [*found[-1], *row] if found else row
        size = len(longer) * volume(row[0].block.ranges)
        if found and size <= LARGEST_STACK and tiled([block.block.ranges for block in longer]) is not None:
            found[-1] = longer
        else:
            found.append(row)
    for together in found:
        box = tiled([block.block.ranges for block in together])
        assert box is not None
        yield Tile(member, tuple(together), *box)


def _within(items: Sequence[Any], sizes: Sequence[int]) -> Iterator[list[Any]]:
    """Divide a sequence into runs of at most ``LARGEST_STACK`` elements, or of one item."""
    together: list[Any] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if together and total + size > LARGEST_STACK:
            yield together
            together, total = [], 0
        together.append(item)
        total += size
    if together:
        yield together
