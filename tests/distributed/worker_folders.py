"""One rank: writes checkpoint folders under some engines, or goes on from folders that others have written."""

from __future__ import annotations

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from engines import Engine, deviation, every_engine
from launching import leave

import lightning_soo
from lightning_soo.checkpoint.sources import FolderSource

# refreshes are in flight when the checkpoint is written (every 4 steps from 3, swapped 3 later), and differ by block
SAVED, LAST = 8, 14
DELAY = 3


def options_of(method: str) -> dict[str, object]:
    if method == "sonew":
        return {"method": method, "chain": "flat", "bandwidth": 3}
    return {"method": method, "refresh_delay": DELAY, "stagger": True}


def write(kind: type[Engine], method: str, folder: Path, rank: int, ranks: int) -> None:
    engine = kind(options_of(method))
    engine.train(0, SAVED, rank, ranks)
    if method in ("shampoo", "soap", "kfac"):
        assert engine.optimizer._refresher is not None and engine.optimizer._refresher.in_flight
    lightning_soo.save_checkpoint(folder, engine.model, engine.optimizer, extra={"step": SAVED})
    engine.train(SAVED, LAST, rank, ranks)
    if rank == 0:
        torch.save(engine.parameters(), folder.with_suffix(".expected"))
    else:
        engine.parameters()  # collective
    engine.optimizer.close()


def read(kind: type[Engine], method: str, folder: Path, rank: int, ranks: int) -> None:
    engine = kind(options_of(method))
    engine.train(0, 2, rank, ranks)  # it is no fresh one
    saved = FolderSource(folder).content["optimizers"][0]
    assert engine.optimizer._plan is not None and saved["plan"] == engine.optimizer._plan.blocks_digest()
    assert any(entry.startswith("max_preconditioner_dim=") for entry in saved["configuration"])
    report, extra = lightning_soo.load_checkpoint(folder, engine.model, engine.optimizer)
    assert report.is_complete and extra == {"step": SAVED}, report
    # a run that is stopped again at once: what was read is written, and read
    again = folder.with_name(f"{folder.name}-{kind.name}-{ranks}")
    lightning_soo.save_checkpoint(again, engine.model, engine.optimizer)
    lightning_soo.load_checkpoint(again, engine.model, engine.optimizer)
    engine.train(SAVED, LAST, rank, ranks)
    expected = torch.load(folder.with_suffix(".expected"), weights_only=True)
    single = "zero" in kind.name or "zero" in folder.name
    error = deviation(engine.parameters(), {name: value.double() for name, value in expected.items()})
    bound = 1e-5 if single else 1e-9
    assert error <= bound, f"{folder.name} -> {kind.name} at {ranks}: deviates by {error:.2g} of the movement"
    if rank == 0:
        print(f"{folder.name} -> {kind.name} at {ranks}: {error:.1e}", flush=True)
    engine.optimizer.close()


def main(folder: Path, tasks: list[str]) -> None:
    """Args: tasks: ``method:engine`` writes, ``method:engine:name`` reads what was written as ``name``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    engines = {**every_engine(), "single": Engine}
    for task in tasks:
        method, engine, *source = task.split(":")
        if source:
            read(engines[engine], method, folder / source[0], rank, ranks)
        else:
            write(engines[engine], method, folder / f"{method}-{engine}-{ranks}", rank, ranks)
    leave()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), sys.argv[2:])
