"""Checkpoint folders from any engine and number of ranks to any other, with refreshes in flight."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from launching import torchrun

WORKER = Path(__file__).parent / "worker_folders.py"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None

# one world after the other: ranks, what is written there, what is read there (its name -> engine)
WORLDS: list[tuple[int, list[str]]] = [
    (2, ["shampoo:ddp", "shampoo:fsdp1-flat", "soap:fsdp2", "sonew:ddp", "kfac:fsdp1"]),
    (
        3,
        [
            *("shampoo:fsdp2:shampoo-ddp-2", "shampoo:ddp:shampoo-fsdp1-flat-2", "soap:fsdp1:soap-fsdp2-2"),
            *("sonew:fsdp1-flat:sonew-ddp-2", "kfac:fsdp2:kfac-fsdp1-2", "shampoo:fsdp2", "kfac:fsdp2", "sonew:fsdp2"),
        ],
    ),
    (
        1,
        [
            *("shampoo:single:shampoo-fsdp2-3", "kfac:single:kfac-fsdp2-3", "sonew:single:sonew-fsdp2-3"),
            *("soap:single:soap-fsdp2-2", "shampoo:single"),
        ],
    ),
    (4, ["shampoo:hsdp:shampoo-single-1", "kfac:hsdp:kfac-fsdp2-3", "shampoo:hsdp", "soap:ddp:soap-fsdp2-2"]),
    (2, ["shampoo:fsdp2:shampoo-hsdp-4", "shampoo:fsdp1:shampoo-hsdp-4", "shampoo:ddp:shampoo-single-1"]),
]
ZERO: list[tuple[int, list[str]]] = [
    (2, ["shampoo:ddp", "shampoo:zero-2-one-group", "sonew:zero-3-one-group"]),
    (
        3,
        [
            *("shampoo:zero-3-one-group:shampoo-ddp-2", "shampoo:fsdp2:shampoo-zero-2-one-group-2"),
            *("shampoo:zero-2-one-group:shampoo-zero-2-one-group-2", "sonew:zero-2-one-group:sonew-zero-3-one-group-2"),
            *("shampoo:zero-3-one-group",),
        ],
    ),
    (1, ["shampoo:zero-2-one-group:shampoo-zero-3-one-group-3", "shampoo:single:shampoo-zero-3-one-group-3"]),
]


def test_row_10_and_11_any_engine_goes_on_from_any_other(tmp_path: Path) -> None:
    for ranks, tasks in WORLDS:
        torchrun(WORKER, ranks, tmp_path, *tasks)


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed")
def test_row_10_and_11_zero_goes_on_from_others_and_others_from_zero(tmp_path: Path) -> None:
    for ranks, tasks in ZERO:
        torchrun(WORKER, ranks, tmp_path, *tasks)
