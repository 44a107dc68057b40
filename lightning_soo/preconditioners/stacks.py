"""Equal blocks in one tensor: one batched product in place of many small ones. Pure tensors: no process group."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_soo.placement.costs import product_flops
from lightning_soo.preconditioners.kronecker import KroneckerBlock

# on a CPU a product above this is as fast by itself: 256 x 256 has 7e7 flops, 512 x 512 has 5e8 (benchmarks/NOTES.md)
_ALONE = 1.5e8


class Stack:
    """Blocks of one kind (:func:`kind_of`) that are preconditioned together.

    Their roots lie in one tensor for each dimension, and each block's are views of it; a block that has got others, by
    a refresh or from a checkpoint, has them copied in before the next use. So nothing is held twice.
    """

    def __init__(self, blocks: Sequence[KroneckerBlock]) -> None:
        self.blocks = tuple(blocks)
        self._together = replace(self.blocks[0], statistics=None, roots=None, diagnostics={})
        self._views: list[list[Tensor]] = []
        self._stacked: list[Tensor] = []

    def gather(self) -> bool:
        """Bring the blocks' state together.

        Returns:
            False where they cannot go together now: a block has no roots yet, or SOAP's second moments have seen
            different steps.
        """
        states = [block.working_state() for block in self.blocks]
        known = [state for state in states if state is not None]
        if len(known) < len(states) or any(number != known[0][1] for _, number in known):
            return False
        if not self._stacked:
            self._stacked = [tensor.new_empty((len(states), *tensor.shape)) for tensor in known[0][0]]
            self._views = [list(views) for views in zip(*self._stacked, strict=True)]
        for block, views, (tensors, number) in zip(self.blocks, self._views, known, strict=True):
            if all(view is tensor for view, tensor in zip(views, tensors, strict=True)):
                continue
            for view, tensor in zip(views, tensors, strict=True):
                if view is not tensor:
                    view.copy_(tensor)
            block.set_working_state(views, number)
        self._together.set_working_state(self._stacked, known[0][1])
        return True

    def precondition(self, filtered: Tensor, gradient: Tensor | None, group: Mapping[str, Any]) -> Tensor:
        """As each block's own, of stacks ``(blocks, *shape)`` in the blocks' order; after :meth:`gather`."""
        found = self._together.precondition(filtered, gradient, group)
        state = self._together.working_state()
        assert state is not None
        for block, views in zip(self.blocks, self._views, strict=True):
            block.set_working_state(views, state[1])
        return found


def kind_of(block: KroneckerBlock) -> Hashable:
    """What blocks of one stack have in common."""
    cut = block.block.shape, block.block.dims, block.block.diagonals
    return type(block), *cut, block.compute_dtype, block.statistics_dtype, block.device


def gains_by_stacking(block: KroneckerBlock) -> bool:
    """Whether a stack of such blocks is faster than one after the other: where starting a product takes its share."""
    return block.device.type != "cpu" or product_flops(block.block) < _ALONE


def apart(tensor: Tensor) -> Tensor:
    """The tensor without the rest of its stack, which would be saved with it."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
