"""In place of the package of this name: accuracy, for Accelerate's own test scripts."""

from __future__ import annotations

from typing import Any

import torch


class Accuracy:
    def __init__(self) -> None:
        self.hits: list[bool] = []

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        self.hits += (torch.as_tensor(predictions) == torch.as_tensor(references)).tolist()

    def compute(self) -> dict[str, float]:
        found, self.hits = self.hits, []
        return {"accuracy": sum(found) / len(found)}


def load(*_: str) -> Accuracy:
    return Accuracy()
