"""How an engine has laid parameters over ranks, as adapters report it and as all ranks know it after an exchange."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_soo.placement.fragments import Fragment
from lightning_soo.placement.overrides import ParameterSpec


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one rank's adapter reports.

    Attributes:
        engine: name for tables and messages.
        fragments: one per parameter in an order that is the same on every rank; empty ones where nothing is here.
        specs: the same parameters as placement sees them.
        groups: number of the parameter group of each fragment.
        shard_group: the process group over which one copy of the model is divided; None is all ranks.
        shard_ranks: ranks (of all) that together hold one copy of the model, this one among them; empty where every
            rank holds everything.
        part_of: ``id(tensor)`` -> part, for engines that call ``step()`` once per part.
        pending_gradients: for such engines: the gradients that are not in ``.grad`` yet, and the factor by which they
            are still scaled; asked for before the first part moves.
        loss_divisor: for engines that scale the loss themselves: what they have divided it by.
        updates_model_later: whether the model has the new parameters only after the step, as masters are apart.
        write_back: for engines whose fragments are masters apart from the model: gives the model what the fragments'
            tensors hold, after they were overwritten in place. Collective. None: they are the model's own parameters.
        forget_gathered: for engines that gather parameters and keep some until a backward pass: lets go of the model's.
        gathered: a context in which the model computes with whole parameters, its own, and no collective of the engine
            runs in its passes: name -> parameter. None for engines that have no such state.
        shared_buffers: for engines whose forward pass would make a model's buffers those of rank 0: which ones.
    """

    engine: str
    fragments: tuple[Fragment, ...]
    specs: tuple[ParameterSpec, ...]
    groups: tuple[int, ...]
    shard_group: Any = None
    shard_ranks: tuple[int, ...] = ()
    part_of: Mapping[int, int] = field(default_factory=dict)
    pending_gradients: Callable[[], tuple[Mapping[int, Tensor], float]] | None = None
    loss_divisor: Callable[[], float] | None = None
    updates_model_later: bool = False
    write_back: Callable[[], None] | None = None
    forget_gathered: Callable[[Any], None] | None = None
    gathered: Callable[[Any], AbstractContextManager[Mapping[str, Tensor]]] | None = None
    shared_buffers: Callable[[Any], list[Tensor]] | None = None

    def row(self, rank: int) -> list[int]:
        """This rank's place and ranges as integers, for the exchange."""
        ranges = [edge for fragment in self.fragments for edge in (fragment.start, fragment.stop)]
        copy = self.shard_ranks or (rank,)
        return [len(copy), copy[0], *ranges]


@dataclass(frozen=True, kw_only=True)
class FragmentTable:
    """What every rank holds of every parameter.

    Attributes:
        ranges: ``[rank][parameter] -> (start, stop)``.
        shard: place of each rank in its copy of the model.
        replica: which copy each rank belongs to.
    """

    ranges: tuple[tuple[tuple[int, int], ...], ...]
    shard: tuple[int, ...]
    replica: tuple[int, ...]

    @classmethod
    def whole(cls, numels: Sequence[int], ranks: int) -> FragmentTable:
        """Every rank holds everything."""
        row = tuple((0, numel) for numel in numels)
        return cls(ranges=(row,) * ranks, shard=(0,) * ranks, replica=tuple(range(ranks)))

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], shapes: Mapping[str, tuple[int, ...]]) -> FragmentTable:
        """Read the rows of all ranks.

        Raises:
            ValueError: ranks that do not agree about the copies, or a parameter that no copy holds completely.
        """
        leads = [row[1] for row in rows]
        copies = sorted(set(leads))
        replica = tuple(copies.index(lead) for lead in leads)
        shard = tuple(leads[:rank].count(lead) if rows[rank][0] > 1 else 0 for rank, lead in enumerate(leads))
        ranges = tuple(tuple((row[index], row[index + 1]) for index in range(2, len(row), 2)) for row in rows)
        sizes = {(row[0], leads.count(row[1])) for row in rows}
        if len(sizes) != 1 or any(size != count for size, count in sizes):
            raise ValueError(f"ranks report copies of the model of different sizes (said, found): {sorted(sizes)}")
        table = cls(ranges=ranges, shard=shard, replica=replica)
        first = {place: ranges[rank] for rank, place in reversed(list(enumerate(shard)))}
        for rank, place in enumerate(shard):
            if ranges[rank] != first[place]:
                raise ValueError(f"rank {rank} holds other elements than the same place of another copy of the model")
        for index, (name, shape) in enumerate(shapes.items()):
            table.check(index, name, math.prod(shape))
        return table

    def check(self, parameter: int, name: str, numel: int) -> None:
        """Raise unless every copy of the model holds all elements of a parameter, in the order of its ranks."""
        copies: dict[int, list[int]] = {}
        for rank, replica in enumerate(self.replica):
            copies.setdefault(replica, []).append(rank)
        for _, ranks in sorted(copies.items()):
            held = [self.ranges[rank][parameter] for rank in ranks]
            if all(piece == (0, numel) for piece in held):
                continue
            filled = [(piece, rank) for piece, rank in zip(held, ranks, strict=True) if piece[0] < piece[1]]
            position = 0
            for (start, stop), rank in filled:
                if start != position:
                    raise ValueError(
                        f"parameter {name!r}: rank {rank} holds elements [{start}, {stop}), but the next ones missing "
                        f"are [{position}, ...)"
                    )
                position = stop
            if position != numel:
                raise ValueError(f"parameter {name!r}: ranks {ranks} hold {position} of its {numel} elements")

    @property
    def ranks(self) -> int:
        return len(self.shard)

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return max(self.shard) + 1

    def copy_of(self, rank: int) -> list[int]:
        """The ranks of the copy that ``rank`` belongs to, by place."""
        return [other for other in range(self.ranks) if self.replica[other] == self.replica[rank]]

    def is_replicated(self, parameter: int, numel: int) -> bool:
        """Whether every rank holds all of a parameter."""
        return all(row[parameter] == (0, numel) for row in self.ranges)

    def counts(self, rank: int, parameter: int, numel: int) -> bool:
        """Whether ``rank`` is the one that adds these elements to a sum over all ranks: each is added once.

        Always, where every rank holds everything: then nothing is summed over ranks.
        """
        if self.shards == 1:
            return True
        return rank == 0 if self.is_replicated(parameter, numel) else self.replica[rank] == 0

    def cut_rows(self, parameter: int, columns: int) -> tuple[int, ...]:
        """The rows of ``columns`` elements that no rank of a copy holds in one piece, in order."""
        held = [self.ranges[rank][parameter] for rank in self.copy_of(0)]
        edges = {edge for start, stop in held if start < stop for edge in (start, stop)}
        return tuple(sorted({edge // columns for edge in edges if edge % columns}))

    def digest_rows(self) -> list[object]:
        rows = dict.fromkeys(self.ranges)  # ranks that hold the same, as all do under DDP, are written once
        number = {row: index for index, row in enumerate(rows)}
        return [list(self.shard), list(self.replica), [number[row] for row in self.ranges], [list(row) for row in rows]]
