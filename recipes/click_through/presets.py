"""Options of train.py and their defaults."""

from __future__ import annotations

SMALL = {
    "steps": 132,  # one pass over the training flights
    "batch_size": 2048,
    "lr": 2e-3,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "beta2": 0.99,
    "clip": 1.0,
    "evaluate_every": 33,
    "width": 32,
    "bottom": "256-128",
    "top": "512-256",
    "table_rows": 100_000,
    "lot": 1,
    "held_out": 0,
    "evaluation_batch": 1024,
}
PAPER = {  # the DLRM of MLPerf's Criteo benchmark; README.md says what differs
    **SMALL,
    "steps": 256_000,  # one pass over 4.2 billion examples
    "batch_size": 16_384,
    "lr": 1e-3,
    "warmup": 0.03,
    "weight_decay": 0.0,
    "beta2": 0.999,
    "clip": 0.0,
    "evaluate_every": 12_800,
    "width": 128,
    "bottom": "512-256",
    "top": "1024-1024-512-256",
    "table_rows": 1_000_000,
    "lot": 128,
    "held_out": 4_194_304,
    "evaluation_batch": 16_384,
}


def sizes(text: str) -> list[int]:
    """Of hidden layers: ``"512-256"``."""
    return [int(size) for size in text.split("-")]
