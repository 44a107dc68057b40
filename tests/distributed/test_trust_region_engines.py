"""Trust-region Newton-CG takes the trajectory of one process on every engine with a second derivative."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launching import torchrun

WORKER = Path(__file__).parent / "worker_trust_region.py"
ALL_ENGINES = bool(os.environ.get("SOO_TEST_ALL_ENGINES"))
TWO = ["ddp", "fsdp1-flat", "fsdp2", "fsdp2-checkpointing"]
MORE = ["fsdp1", "fsdp1-ignored", "fsdp1-checkpointing", "fsdp1-no-shard", "fsdp1-shard-grad-op", "fsdp2-offload"]


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, TWO + (MORE if ALL_ENGINES else [])),
        (4, ["ddp", "hsdp", "fsdp1-hybrid"] if ALL_ENGINES else ["hsdp"]),
        *([(1, ["ddp", "fsdp1", "fsdp2"]), (3, ["ddp", "fsdp1-flat", "fsdp2"])] if ALL_ENGINES else []),
    ],
)
def test_engines_equal_one_process(ranks: int, names: list[str]) -> None:
    torchrun(WORKER, ranks, *names)


def test_zero_is_refused_by_name() -> None:
    pytest.importorskip("deepspeed")
    torchrun(WORKER, 2, "zero-1", "zero-3")
