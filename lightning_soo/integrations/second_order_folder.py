"""The checkpoint folder ``second_order`` that doors write beside an engine's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.manifest import unfinished
from lightning_soo.transport import Transport, share_object

NAME = "second_order"
Found = TypeVar("Found")


def is_there(folder: Path) -> bool:
    """Whether there is a checkpoint of ours, the same answer on every rank. Collective.

    Raises:
        CheckpointError: on every rank: saving was interrupted before it was complete, or only some ranks see it.
    """
    sees = store.is_store(folder)
    transport = Transport(enabled=dist.is_initialized())
    rows = transport.all_gather_integers([int(sees), int(not sees and unfinished(folder).exists())])
    without = [rank for rank, row in enumerate(rows) if not row[0]]
    if without and len(without) < len(rows):
        raise CheckpointError(
            f"rank {without[0]} does not see {folder}, other ranks do: every rank needs the same files, on a disk that "
            "all machines share"
        )
    if any(row[1] for row in rows):
        raise CheckpointError(f"{folder} is not complete: saving was interrupted; take an earlier checkpoint")
    return sees


def from_first_rank(read: Callable[[], Found]) -> Found:
    """What rank 0 reads, plain data, on every rank; its refusal is everyone's. Collective.

    Raises:
        CheckpointError: it cannot be read.
    """
    found: Any = None
    error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = read()
        except (CheckpointError, OSError) as raised:
            error = str(raised)
    found, error = share_object((found, error))
    if error is not None:
        raise CheckpointError(error)
    result: Found = found
    return result
