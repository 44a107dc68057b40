"""Preconditioners in a file of their own, beside the files of an engine that cannot carry them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lightning_soo.checkpoint.preconditioners import collect_preconditioners, restore_preconditioners
from lightning_soo.transport import share_object

if TYPE_CHECKING:
    from lightning_soo.optim.base import SecondOrderOptimizer

FILE = "second_order.bin"


def write_side_file(optimizers: Sequence[SecondOrderOptimizer], folder: str | os.PathLike[str], is_first: bool) -> None:
    """Gather what all ranks hold; the first one writes it under a temporary name and renames it. Collective."""
    saved = collect_preconditioners(optimizers, is_first)
    if is_first:
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        torch.save(saved, unfinished)
        os.replace(unfinished, path)


def read_side_file(optimizers: Sequence[SecondOrderOptimizer], folder: str | os.PathLike[str], is_first: bool) -> None:
    """The first rank reads, and all get it, after the engine has loaded its part. Collective.

    Without the file the optimizers refuse to go on silently.
    """
    path, found = Path(folder) / FILE, None
    if is_first and path.is_file():
        found = torch.load(path, map_location="cpu", weights_only=True)
    restore_preconditioners(optimizers, share_object(found))
