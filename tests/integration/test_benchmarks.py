"""The benchmarks run: on a model of a few numbers, and without a word about how fast."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import step_time
from tasks import Task


def test_step_time_prints_a_row_for_every_contender() -> None:
    task = Task(
        name="tiny",
        model=lambda: nn.Linear(6, 6),
        batch=lambda step: torch.ones(2, 6),
        loss=lambda net, x: net(x).square().mean(),
        flops=1.0,
    )
    rates = dict.fromkeys(("float32", "bfloat16", "memory", "eigh"), 1.0)
    lines = step_time.measure(task, rates, repeats=2)
    for name in ("AdamW foreach", "AdamW fused", "ours, defaults", "ours, economical"):
        row = next(line for line in lines if line.startswith(f"| {name} |"))
        assert len(row.split("|")) == 8 and float(row.split("|")[5]) > 0
