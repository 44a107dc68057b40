"""Preconditioners in the folders of ``accelerator.save_state``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_soo.checkpoint.preconditioners import collect_preconditioners, restore_preconditioners
from lightning_soo.optim.base import SecondOrderOptimizer

FILE = "second_order.bin"


def save_preconditioners(
    accelerator: Any, optimizers: Sequence[SecondOrderOptimizer], folder: str, *, on_each_node: bool | None = None
) -> None:
    """Before Accelerate writes the rest: gather them, and write a file where the engine does not carry them.

    Collective. In one process and under DDP they are part of the optimizer's own state, which is written next: by the
    main process, or with ``on_each_node`` by one of each machine (None is what the accelerator is configured to do).
    """
    if not any(optimizer.is_sharded for optimizer in optimizers):
        everywhere = accelerator.project_configuration.save_on_each_node if on_each_node is None else on_each_node
        for optimizer in optimizers:
            optimizer.consolidate(to=None if everywhere else 0)
        return
    saved = collect_preconditioners(optimizers, accelerator.is_main_process)
    if accelerator.is_main_process:
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(saved, unfinished)
        os.replace(unfinished, path)


def load_preconditioners(accelerator: Any, optimizers: Sequence[SecondOrderOptimizer], folder: str) -> None:
    """After an engine that shards has loaded its part: hand the file's content to every rank. Collective.

    Without the file the optimizers refuse to go on silently.
    """
    if not any(optimizer.is_sharded for optimizer in optimizers):
        return
    from accelerate.utils import broadcast_object_list

    path, found = Path(folder) / FILE, [None]
    if accelerator.is_main_process and path.is_file():
        found = [torch.load(path, map_location="cpu", weights_only=True)]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    restore_preconditioners(optimizers, found[0])
