"""One rank of the soak: trains from the newest checkpoint, or replays what was accepted.

`benchmarks/soak.py` starts it. The environment is torchrun's. It ends with status 3 where another rank has gone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from soak_journal import Journal, Segment
from soak_plan import ACCEPTED, NAN, SAVE_EVERY, SKIPPED, draw_outcome, folder_name, in_background
from soak_samples import Sampler
from soak_task import ENGINES, make_batch, make_model, make_optimizer, whole_parameters, wrap
from torch import nn

from lightning_soo import BackgroundSaver, CheckpointError, load_checkpoint, newest_complete, save_checkpoint

PEER_HAS_GONE = 3
GROUP_TIMEOUT = 30.0  # seconds
BREAKS = ("step", "process", "descriptor", "memory")


class Rank:
    """A model, its optimizer, and what this rank knows of the run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, Path(arguments.folder)
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if self.ranks > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=GROUP_TIMEOUT))
        self.model = wrap(make_model(), arguments.engine)
        self.optimizer = make_optimizer(self.model, json.loads(arguments.workers))

    def evaluate(self, step: int, *, broken: bool = False) -> None:
        """Forward and backward."""
        inputs, targets = make_batch(step, self.rank, self.ranks, broken=broken)
        nn.functional.mse_loss(self.model(inputs), targets).backward()

    def keep_parameters(self, name: str) -> None:
        """For the comparison with an undisturbed run."""
        parameters = whole_parameters(self.model)
        if self.rank == 0:
            torch.save(parameters, self.folder / name)

    def leave(self) -> None:
        """End without the interpreter's own end, in which gloo's threads abort the process now and then."""
        self.optimizer.close()
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Training(Rank):
    """One life."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.life = arguments.life
        self.saver = BackgroundSaver()
        self.under_way: int | None = None
        self.leaked: list[torch.Tensor] = []
        self.journal = Journal(self.folder / "journal.jsonl") if self.rank == 0 else None
        self.samples = Sampler(self.folder / f"samples-{self.life}-{self.rank}")
        newest = newest_complete(self.folder / "checkpoints")
        extra: dict[str, Any] = {"step": 0, "segments": []}
        if newest is not None:
            report, extra = load_checkpoint(newest, self.model, self.optimizer)
            assert report.is_complete, report
        self.segments: list[dict[str, Any]] = extra["segments"]
        self.own = Segment(self.life, self.ranks, extra["step"], extra["step"])
        self.keep_parameters(f"start-{self.life}.pt")
        source = newest.name if newest is not None else None
        self.note(start=self.own.first, ranks=self.ranks, source=source)

    def note(self, **line: Any) -> None:
        if self.journal is not None:
            self.journal.write(life=self.life, **line)

    def train(self) -> None:
        stop = self.own.first + self.arguments.steps
        while self.arguments.endless or self.own.stop < stop:
            self.step(self.own.stop)
            if self.own.stop % SAVE_EVERY == 0:
                self.save(in_background(self.arguments.seed, self.life, self.own.stop))
        self.save(False)
        self.saver.close()
        self.keep_parameters(f"end-{self.life}.pt")
        self.note(end=self.own.stop)

    def step(self, step: int) -> None:
        outcome = draw_outcome(self.arguments.seed, self.life, step)
        before = self.optimizer.steps
        self.evaluate(step, broken=outcome == NAN)
        loses = "step" in self.arguments.breaks and step == self.own.first + 5
        if outcome != SKIPPED and not loses:
            self.optimizer.step()
        self.optimizer.zero_grad()
        moved = self.optimizer.steps - before
        assert moved == (outcome == ACCEPTED) or loses, f"step {step} ({outcome}): the optimizer took {moved} steps"
        if outcome != ACCEPTED:
            self.own.left_out.append(step)
        self.own.stop = step + 1
        if "descriptor" in self.arguments.breaks:
            os.open(os.devnull, os.O_RDONLY)
        if "memory" in self.arguments.breaks:
            self.leaked.append(torch.ones(2**20, dtype=torch.uint8))
        self.note(step=step, did=outcome)
        self.samples.take(step)

    def save(self, background: bool) -> None:
        """Also waits for the last one, so that checkpoints are completed in the order of their steps."""
        self.saver.wait()
        if self.under_way is not None:
            self.note(saved=self.under_way)
        self.under_way = self.own.stop if background else None
        self.note(saving=self.own.stop, background=background)
        save_checkpoint(
            self.folder / "checkpoints" / folder_name(self.own.stop),
            self.model,
            self.optimizer,
            extra={"step": self.own.stop, "segments": [*self.segments, self.own.plain()]},
            background=self.saver if background else None,
        )
        if not background:
            self.note(saved=self.own.stop)


def replay(rank: Rank) -> None:
    """Train the accepted steps alone; keep the parameters where each life began and where the last one ended."""
    for entry in json.loads((rank.folder / "segments.json").read_text()):
        segment = Segment(**entry)
        rank.keep_parameters(f"replayed-start-{segment.life}.pt")
        for step in segment.accepted:
            rank.evaluate(step)
            rank.optimizer.step()
            rank.optimizer.zero_grad()
        rank.keep_parameters(f"replayed-end-{segment.life}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--engine", choices=ENGINES, default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--life", type=int, help="its number; without one, accepted steps are replayed")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--endless", action="store_true", help="until it is killed")
    parser.add_argument("--workers", default='{"kind": "inline"}', help="json")
    parser.add_argument("--breaks", nargs="*", choices=BREAKS, default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if arguments.life is None:
            rank = Rank(arguments)
            replay(rank)
        else:
            rank = Training(arguments)
            rank.train()
    except (AssertionError, CheckpointError):
        raise
    except Exception as error:
        traceback.print_exc()
        print(f"ended by {type(error).__name__}", file=sys.stderr, flush=True)
        os._exit(PEER_HAS_GONE)
    if "process" in arguments.breaks:
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")
    rank.leave()


if __name__ == "__main__":
    main()
