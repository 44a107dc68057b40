"""Ranks that differ, fail or hold nothing: the stated result on every rank, and no hang."""

from __future__ import annotations

from pathlib import Path

from launching import torchrun


def test_every_rank_is_told() -> None:
    torchrun(Path(__file__).parent / "worker_edge_cases.py", 3)


def test_layers_of_some_ranks() -> None:
    torchrun(Path(__file__).parent / "worker_layers.py", 3)
