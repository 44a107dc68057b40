"""What a checkpoint holds beside an engine's own: the preconditioners, where the engine cannot carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_soo.optim.base import SecondOrderOptimizer

PRECONDITIONERS = "second_order"
"""Key of the checkpoint: for each optimizer what ``blocks_state_dict`` gave on rank 0, after ``consolidate``."""


def collect_preconditioners(optimizers: Sequence[SecondOrderOptimizer], is_first: bool) -> list[dict[str, Any]]:
    """For each optimizer plain data, whole on rank 0 and empty elsewhere. Collective."""
    for optimizer in optimizers:
        optimizer.consolidate(to=0)
    return [optimizer.blocks_state_dict() if is_first else {} for optimizer in optimizers]


def join_preconditioners(checkpoint: dict[str, Any]) -> None:
    """What an engine that shards the moments has saved apart goes where an engine that does not looks for it."""
    saved = checkpoint.pop(PRECONDITIONERS, ())
    for state, blocks in zip(checkpoint.get("optimizer_states", ()), saved, strict=False):
        state.setdefault("second_order", blocks)


def restore_preconditioners(
    optimizers: Sequence[SecondOrderOptimizer], saved: Sequence[Mapping[str, Any]] | None
) -> None:
    """Give each optimizer its own, after the engine restored the rest; the same on every rank.

    A checkpoint without any, from a first-order run, is left to the optimizers, which refuse to go on silently.

    Raises:
        ValueError: saved for another number of optimizers, other parameters or another method.
    """
    if saved is None:
        return
    if len(saved) != len(optimizers):
        raise ValueError(
            f"the checkpoint has the preconditioners of {len(saved)} optimizers, here are {len(optimizers)}: resume "
            "with the optimizers that it was saved with"
        )
    for optimizer, blocks in zip(optimizers, saved, strict=True):
        optimizer.load_blocks(blocks)
