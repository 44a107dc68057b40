"""Saves one checkpoint after the other into the same folder, until it is killed, or kills itself at a given moment."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_soo
from lightning_soo.checkpoint import manifest, store


def die(*arguments: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def model_of(number: int) -> tuple[nn.Module, lightning_soo.Shampoo]:
    """Everything in it tells the number of the checkpoint."""
    torch.manual_seed(number)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    optimizer = lightning_soo.Shampoo(model, lr=0.1, workers="inline")
    model(torch.randn(8, 40)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def main(folder: Path, moment: str) -> None:
    for number in range(1000):
        model, optimizer = model_of(number)
        if number == 1 and moment == "data":
            store.ManifestWriter.write_data = die  # type: ignore[method-assign]
        elif number == 1 and moment == "manifest":
            manifest.Manifest.write = die  # type: ignore[method-assign]
        elif number == 1 and moment == "away":  # the old one has been renamed
            os.replace = lambda a, b: die() if Path(b) == folder else os.rename(a, b)  # type: ignore[assignment]
        elif number == 1 and moment == "named":  # the new one has its name, the old one is still there
            store._sync = lambda path: die() if path == folder.parent else None
        lightning_soo.save_checkpoint(folder, model, optimizer, extra={"number": number})
        print(number, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
