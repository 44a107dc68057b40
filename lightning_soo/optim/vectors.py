"""Vectors over all trainable parameters, as they are shared between ranks.

A *whole* vector has every element, in the order of the parameters: what a product with a curvature matrix takes and
gives. A *local* one has those that this rank keeps: all of them on one device and under DDP, its fragments under FSDP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_soo.linalg.trust_region import gram_matrix
from lightning_soo.placement.layout import FragmentTable, Layout
from lightning_soo.transport import Transport


class VectorSpace:
    """Conversions between parameters, local and whole vectors, and the sums over ranks that go with them.

    Collective to build: every rank does, with the same table.

    Attributes:
        names: of the parameters, in the order of the vectors.
        device, dtype: of every vector; float32, or float64 where a parameter is.

    Raises:
        TypeError: parameters in half precision or on several devices.
    """

    def __init__(self, layout: Layout, table: FragmentTable, transport: Transport) -> None:
        copy = table.copy_of(transport.rank)
        trainable = [index for index, spec in enumerate(layout.specs) if spec.requires_grad]
        numels = {index: math.prod(layout.specs[index].shape) for index in trainable}
        whole_here = {index for index in trainable if all(table.ranges[r][index] == (0, numels[index]) for r in copy)}
        # those that every rank of a copy holds come last: one rank alone counts them in a sum
        order = sorted(trainable, key=lambda index: index in whole_here)
        self.names = [layout.specs[index].name for index in order]
        self._fragments = [layout.fragments[index] for index in order]
        self._shapes = [layout.specs[index].shape for index in order]
        self._numels = [numels[index] for index in order]
        self._groups = [layout.groups[index] for index in order]
        self._ranges = [[table.ranges[rank][index] for index in order] for rank in copy]
        self._place = copy.index(transport.rank)
        self._replicated = sum(numels[index] for index in order if index in whole_here) if len(copy) > 1 else 0
        self._shared = sum(index not in whole_here for index in order) if len(copy) > 1 else 0
        self._in_copy = transport.over(layout.shard_group, enabled=len(copy) > 1)
        self._across = _across_copies(table, transport, len(copy))
        self.device, self.dtype = self._kind()

    def _kind(self) -> tuple[torch.device, torch.dtype]:
        for fragment in self._fragments:
            if fragment.tensor.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"parameter {fragment.name!r} is {fragment.tensor.dtype}: the ratio of actual to predicted "
                    "reduction needs float32 parameters; keep them so and compute under torch.autocast"
                )
        devices = {fragment.tensor.device for fragment in self._fragments}
        if len(devices) != 1:
            raise TypeError(f"parameters are on {len(devices)} devices ({', '.join(sorted(map(str, devices)))}): one")
        double = any(fragment.tensor.dtype == torch.float64 for fragment in self._fragments)
        return devices.pop(), torch.float64 if double else torch.float32

    @property
    def numel(self) -> int:
        """Elements of a whole vector."""
        return sum(self._numels)

    def read(self, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """The local vector of the parameters, or of tensors laid out like what the optimizer was given for each.

        A copy.
        """
        given = tensors if tensors is not None else [fragment.tensor for fragment in self._fragments]
        pieces = [f.local(one.detach()).reshape(-1) for f, one in zip(self._fragments, given, strict=True)]
        return torch.cat([piece.to(self.dtype) for piece in pieces])

    @torch.no_grad()
    def write(self, local: Tensor, tensors: Sequence[Tensor] | None = None) -> None:
        """Give the parameters, or tensors laid out like them, the values of a local vector."""
        given = tensors if tensors is not None else [fragment.tensor for fragment in self._fragments]
        counts = [fragment.stop - fragment.start for fragment in self._fragments]
        for fragment, one, piece in zip(self._fragments, given, torch.split(local, counts), strict=True):
            target = fragment.local(one.detach())
            target.copy_(piece.view(target.shape))

    @property
    def tensors(self) -> list[Tensor]:
        """What the optimizer was given for each parameter, in the order of the vectors."""
        return [fragment.tensor for fragment in self._fragments]

    def constant(self, values: Sequence[float]) -> Tensor:
        """A local vector with one value for all elements of each parameter group, by its number."""
        pieces = [
            torch.full((fragment.stop - fragment.start,), values[group], dtype=self.dtype, device=self.device)
            for fragment, group in zip(self._fragments, self._groups, strict=True)
        ]
        return torch.cat(pieces)

    def parameters(self, gathered: Mapping[str, Tensor]) -> list[Tensor]:
        """The model's own parameters in the order of the vectors.

        Raises:
            KeyError: a parameter that the gathered model does not have.
        """
        missing = [name for name in self.names if name not in gathered]
        if missing:
            raise KeyError(f"parameter {missing[0]!r} is not one of the gathered model's ({len(gathered)} found)")
        return [gathered[name] for name in self.names]

    def views(self, whole: Tensor) -> list[Tensor]:
        """A whole vector as tensors of the parameters' shapes."""
        return [piece.view(shape) for piece, shape in zip(torch.split(whole, self._numels), self._shapes, strict=True)]

    def zeros(self) -> Tensor:
        """A whole vector of zeros."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def add(self, whole: Tensor, tensors: Sequence[Tensor | None], weight: float) -> None:
        """``whole += weight * tensors``, those that are None left out."""
        for view, one in zip(self.views(whole), tensors, strict=True):
            if one is not None:
                view.add_(one.to(self.device, self.dtype), alpha=weight)

    def sum(self, whole: Tensor) -> Tensor:
        """The local part of the sum of every rank's whole vector; the same bits wherever it is kept."""
        if self._in_copy.size > 1:
            sent = [torch.cat(self._pieces(whole, place)) for place in range(self._in_copy.size)]
            count = sent[self._place].numel()
            arriving = self._in_copy.start_exchange(
                torch.cat(sent), [one.numel() for one in sent], [count] * self._in_copy.size, "a sum over ranks"
            )
            parts = torch.split(arriving.wait(), [count] * self._in_copy.size)
            local = parts[0].clone()
            for part in parts[1:]:
                local.add_(part)
        else:
            local = whole
        return self._across.total(local, "a sum over ranks")

    def gather(self, local: Tensor) -> Tensor:
        """The whole vector of which every rank has its local part."""
        if self._in_copy.size == 1:
            return local
        ours = local[: local.numel() - self._replicated]
        counts = [sum(stop - start for start, stop in row[: self._shared]) for row in self._ranges]
        arriving = self._in_copy.start_exchange(
            ours.repeat(len(counts)), [ours.numel()] * len(counts), counts, "a whole vector"
        )
        whole = self.zeros()
        views = torch.split(whole, self._numels)
        for row, part in zip(self._ranges, torch.split(arriving.wait(), counts), strict=True):
            position = 0
            for view, (start, stop) in zip(views[: self._shared], row[: self._shared], strict=True):
                view[start:stop] = part[position : position + stop - start]
                position += stop - start
        whole[self.numel - self._replicated :] = local[local.numel() - self._replicated :]
        return whole

    def gram(self, vectors: Sequence[Tensor]) -> Tensor:
        """Inner products of local vectors over all elements: (k, k), float64; one small all_reduce where sharded."""
        if self._in_copy.size == 1:
            return gram_matrix(vectors)
        if self._place > 0:
            vectors = [vector[: vector.numel() - self._replicated] for vector in vectors]
        return self._in_copy.total(gram_matrix(vectors), "inner products")

    def _pieces(self, whole: Tensor, place: int) -> list[Tensor]:
        """What the rank at a place of this copy keeps of a whole vector."""
        views = torch.split(whole, self._numels)
        return [view[start:stop] for view, (start, stop) in zip(views, self._ranges[place], strict=True)]


def _across_copies(table: FragmentTable, transport: Transport, size: int) -> Transport:
    """Over the ranks that keep the same elements of other copies of the model."""
    if size == 1:
        return transport
    if transport.size == size:
        return Transport(enabled=False)
    place = table.shard[transport.rank]
    return transport.among([rank for rank, other in enumerate(table.shard) if other == place])
