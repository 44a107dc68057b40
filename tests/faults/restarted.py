"""A rank of a run that torchrun restarts: it goes on from the newest complete checkpoint, and is killed once."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from launching import leave

import lightning_soo

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from engines import Ddp

EVERY, LAST, KILLED_AT = 4, 18, 11
OPTIONS = {"method": "shampoo", "refresh_delay": 3, "stagger": True}


def main(out: Path, killed: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    again = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    engine, step = Ddp(OPTIONS), 0
    newest = lightning_soo.newest_complete(out) if again else None
    if newest is not None:
        step = lightning_soo.load_checkpoint(newest, engine.model, engine.optimizer)[1]["step"]
        assert step == KILLED_AT // EVERY * EVERY
    while step < LAST:
        if killed and not again and step == KILLED_AT and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        engine.train(step, step + 1, rank, ranks)
        step += 1
        if step % EVERY == 0:
            lightning_soo.save_checkpoint(out / f"step-{step}", engine.model, engine.optimizer, extra={"step": step})
    if rank == 0:
        torch.save({"again": again, "parameters": engine.parameters()}, out / "end.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "killed")
