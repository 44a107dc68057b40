"""Where a run takes place: devices, nodes, strategy and precision. None of it changes what is trained."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

from lightning.pytorch.strategies import Strategy, StrategyRegistry

import lightning_soo.strategies  # noqa: F401  # registers soo_ddp, soo_fsdp, soo_fsdp2, soo_hsdp, soo_deepspeed


@dataclass(frozen=True)
class Scaling:
    """Args: strategy: soo_ddp, soo_fsdp, soo_fsdp2, soo_hsdp, soo_deepspeed, or Lightning's. devices: of one node."""

    strategy: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "32-true"
    stage: int = 2
    workers: str = "auto"
    data_workers: int = 0

    @property
    def shards(self) -> bool:
        """Whether a device has less than the whole model."""
        return self.strategy not in ("auto", "ddp", "soo_ddp")

    def trainer_options(self, batch_size: int) -> dict[str, Any]:
        """What the Trainer is given. Args: batch_size: of one device, which DeepSpeed prints."""
        names = ("devices", "num_nodes", "precision")
        return {"strategy": self._strategy(batch_size)} | {name: getattr(self, name) for name in names}

    def _strategy(self, batch_size: int) -> str | Strategy:
        name = self.strategy
        if name == "auto" and self.devices * self.num_nodes > 1:
            name = "soo_ddp"
        if not name.startswith("soo_"):
            return name
        if name not in StrategyRegistry:
            known = ", ".join(one for one in StrategyRegistry if one.startswith("soo_"))
            raise SystemExit(f"--strategy {name}: there are {known}")
        entry = StrategyRegistry[name]
        # by themselves they would make Shampoo of every optimizer; here the callback does it, where it was asked for
        options = dict(entry["init_params"], method=None)
        if name == "soo_deepspeed":
            options |= {"stage": self.stage, "logging_batch_size_per_gpu": batch_size}
        strategy: Strategy = entry["strategy"](**options)
        return strategy


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scaling", "the trajectory is the same, BatchNorm's statistics apart")
    group.add_argument("--strategy", default="auto", help="soo_ddp (on several devices), soo_fsdp2, ...")
    group.add_argument("--devices", type=int, default=1, help="of each node")
    group.add_argument("--num-nodes", type=int, default=1)
    group.add_argument("--precision", default="32-true", help="the Trainer's, such as bf16-mixed")
    group.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="of ZeRO, with soo_deepspeed")
    group.add_argument("--workers", default="auto", help="where roots and bases are computed: inline, thread, process")
    group.add_argument("--data-workers", type=int, default=0, help="processes of each device that make batches")


def chosen_scaling(arguments: argparse.Namespace) -> Scaling:
    return Scaling(**{f.name: getattr(arguments, f.name) for f in fields(Scaling)})
