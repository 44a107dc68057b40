"""One parameter during a step, and the pieces of it that this rank works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_soo.optim import grafting
from lightning_soo.placement.boxes import Box, flat_span, pieces, slices, strides
from lightning_soo.placement.fragments import Fragment
from lightning_soo.placement.plan import PlannedParameter
from lightning_soo.preconditioners.kronecker import KroneckerBlock


@dataclass(eq=False)
class Member:
    """One parameter on one rank; the same list on every rank.

    Attributes:
        fragment: what this rank holds of it; may be nothing.
        blocks: all of its blocks, wherever they live.
        whole_blocks: those preconditioned here that lie completely in the fragment.
        counts: whether this rank adds its elements to sums over all ranks (each element is added once).
        counter: steps of the graft where several parameters share one optimizer tensor, whose state has room for one.
        gradient: laid out like the moments; the direction overwrites it.
        magnitude: largest absolute element of the whole gradient.
        scale: what the direction is multiplied by when it is applied.
    """

    fragment: Fragment
    group: dict[str, Any]
    group_number: int
    planned: PlannedParameter
    blocks: list[KroneckerBlock]
    whole_blocks: list[KroneckerBlock]
    counts: bool = True
    counter: Tensor | None = None
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    magnitude: float = 0.0
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.planned.name

    @property
    def tensor(self) -> Tensor:
        """What the optimizer's state is kept for."""
        return self.fragment.tensor

    @property
    def is_empty(self) -> bool:
        return self.fragment.stop == self.fragment.start

    @property
    def is_ready(self) -> bool:
        """Whether all roots are in, wherever they live; before, the graft moves the whole parameter."""
        return bool(self.blocks) and all(block.ready for block in self.blocks)

    @property
    def merged_shape(self) -> tuple[int, ...]:
        return self.blocks[0].block.merged_shape

    def parameter(self) -> Tensor:
        """The local elements of the parameter."""
        return self.fragment.local(self.tensor)

    def local_gradient(self) -> Tensor | None:
        """The local elements of the gradient, as the engine left it; None where it is missing."""
        return None if self.tensor.grad is None else self.fragment.local(self.tensor.grad)

    def local_state(self, state: dict[str, Any]) -> grafting.State:
        """Views of this parameter's moments in the optimizer's state of its tensor."""
        local = {name: self.fragment.local(state[name]) for name in grafting.MOMENTS if name in state}
        local["step"] = state["step"] if self.counter is None else self.counter
        return local

    def local_pieces(self, block: KroneckerBlock) -> list[Box]:
        """The boxes of ``block`` that lie in the fragment."""
        if self.fragment.is_whole:
            return [block.block.ranges]
        return pieces(self.merged_shape, block.block.ranges, self.fragment.start, self.fragment.stop)

    def view(self, local: Tensor, box: Box) -> Tensor:
        """The elements of ``box`` in a contiguous local tensor, as a view of the box's shape.

        Args:
            box: in coordinates of the merged shape; inside the fragment.
        """
        if self.fragment.is_whole:
            return local.view(self.merged_shape)[slices(box)]
        first, _ = flat_span(self.merged_shape, box)
        return local.as_strided(
            [stop - start for start, stop in box],
            strides(self.merged_shape),
            local.storage_offset() + first - self.fragment.start,
        )
