"""One of the ranks: K-FAC adapts its damping in a loop of Accelerate, by the model's own loss or by a function."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate_script import Net, leave, make_data, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader

BATCH, SGD = 8, {"lr": 0.3, "momentum": 0.0}
KFAC: dict[str, Any] = {
    "statistics_frequency": 1,
    "precondition_frequency": 2,
    "damping": 0.5,  # which falls first, and then rises
    "kl_clip": None,
    "adaptive_damping": {"interval": 2, "factor": 0.8},
}
Run = tuple[dict[str, Tensor], list[float]]


class NetWithLoss(Net):
    """Returns its loss, as models of Transformers do."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        outputs = super().forward(x)
        return {"loss": nn.functional.mse_loss(outputs, y), "logits": outputs} if y is not None else outputs


def train(tell: str = "by model", mixed_precision: str = "no") -> Run:
    """Parameters, and the damping after every step."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    model = NetWithLoss(0)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    loader = DataLoader(make_data(), BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return model(x, y=y)["loss"] if tell == "by model" else nn.functional.mse_loss(model(x), y)

    if tell == "by function":
        from lightning_soo.integrations.accelerate import evaluate_with

        evaluate_with(optimizer, lambda: loss_of(x, y))
    history = []
    for _ in range(2):
        for x, y in loader:
            accelerator.backward(loss_of(x, y))
            optimizer.step()
            optimizer.zero_grad()
            history.append(optimizer.optimizer.damping)
    return whole(model), history


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        found = {tell: train(tell) for tell in ("by model", "by function")}
        try:
            train("not at all")
        except RuntimeError as error:
            assert "evaluate_with" in str(error), error
        else:
            raise AssertionError("not refused")
        torch.save(found, Path(sys.argv[1]) / f"damping{os.environ.get('RANK', '0')}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    leave()
