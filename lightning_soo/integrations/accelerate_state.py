"""Preconditioners in the folders of ``accelerator.save_state``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_soo.checkpoint.side_file import read_side_file, write_side_file
from lightning_soo.optim.base import SecondOrderOptimizer


def save_preconditioners(
    accelerator: Any, optimizers: Sequence[SecondOrderOptimizer], folder: str, *, on_each_node: bool | None = None
) -> None:
    """Before Accelerate writes the rest: gather them, and write a file where the engine does not carry them.

    Collective. In one process and under DDP they are part of the optimizer's own state, which is written next: by the
    main process, or with ``on_each_node`` by one of each machine (None is what the accelerator is configured to do).
    """
    if any(optimizer.is_sharded for optimizer in optimizers):
        write_side_file(optimizers, folder, accelerator.is_main_process)
        return
    everywhere = accelerator.project_configuration.save_on_each_node if on_each_node is None else on_each_node
    for optimizer in optimizers:
        optimizer.consolidate(to=None if everywhere else 0)


def load_preconditioners(accelerator: Any, optimizers: Sequence[SecondOrderOptimizer], folder: str) -> None:
    """After an engine that shards has loaded its part: hand the file's content to every rank. Collective."""
    if any(optimizer.is_sharded for optimizer in optimizers):
        read_side_file(optimizers, folder, accelerator.is_main_process)
