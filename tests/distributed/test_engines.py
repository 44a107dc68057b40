"""Every sharding engine at several world sizes takes the trajectory of one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launching import torchrun

WORKER = Path(__file__).parent / "worker_engines.py"
TORCH = ["ddp", "fsdp1", "fsdp1-flat", "fsdp2"]
ZERO = ["zero-1", "zero-2", "zero-3"]
MORE = [
    *("fsdp1-shard-grad-op", "fsdp1-no-shard", "fsdp1-ignored", "fsdp1-checkpointing"),
    *("fsdp2-offload", "fsdp2-checkpointing"),
]
MORE_ZERO = [
    *("zero-2-offload", "zero-3-offload", "zero-3-sub-groups"),
    *("zero-1-bf16", "zero-2-bf16", "zero-3-bf16"),
]


ALL_ENGINES = bool(os.environ.get("SOO_TEST_ALL_ENGINES"))  # the same paths at more numbers of ranks: minutes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4] if ALL_ENGINES else [2, 3, 4])
def test_torch_engines_equal_one_process(ranks: int) -> None:
    names = TORCH if ALL_ENGINES or ranks == 2 else ["fsdp1-flat", "fsdp2"] if ranks == 3 else ["hsdp"]
    if ALL_ENGINES:
        names = names + (MORE if ranks == 2 else []) + (["hsdp", "fsdp1-hybrid"] if ranks == 4 else [])
    torchrun(WORKER, ranks, "shampoo", *names)


@pytest.mark.parametrize("method", ["soap", "sonew", "kfac"])
@pytest.mark.parametrize(
    ("ranks", "names"),
    [(1, ["fsdp2"]), (2, ["ddp", "fsdp1"]), (3, ["ddp", "fsdp1-flat", "fsdp2"]), (4, ["ddp", "hsdp"])]
    if ALL_ENGINES
    else [(3, ["ddp", "fsdp1-flat", "fsdp2"])],
)
def test_other_methods_equal_one_process(method: str, ranks: int, names: list[str]) -> None:
    torchrun(WORKER, ranks, method, *names)


@pytest.mark.parametrize("method", ["soap", "sonew", "kfac"])
def test_other_methods_under_zero_equal_one_process(method: str) -> None:
    pytest.importorskip("deepspeed")
    torchrun(WORKER, 3, method, *(["zero-2", "zero-3"] if ALL_ENGINES else ["zero-3"]))


def test_layers_on_every_engine() -> None:
    """K-FAC's weights and biases are assembled together, and a bound needs all of a step: more kinds of them."""
    pytest.importorskip("deepspeed")
    names = ["fsdp1-ignored", "fsdp2-checkpointing", "zero-2-one-group", "zero-3-sub-groups"]
    if ALL_ENGINES:
        names += ["fsdp1-flat", "fsdp1-checkpointing", "zero-1", "zero-3-one-group", "zero-2-bf16", "zero-3-offload"]
    torchrun(WORKER, 2, "kfac", *names)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4] if ALL_ENGINES else [3])
def test_zero_equals_one_process(ranks: int) -> None:
    pytest.importorskip("deepspeed")
    torchrun(WORKER, ranks, "shampoo", *ZERO, *(MORE_ZERO if ranks == 2 else []))


def test_bf16_under_zero() -> None:
    pytest.importorskip("deepspeed")
    torchrun(WORKER, 2, "shampoo", "zero-2-bf16")
