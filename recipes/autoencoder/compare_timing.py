"""Milliseconds of a training step of each optimizer on the autoencoder, refreshes included: comparison/timing.csv.

python recipes/autoencoder/compare_timing.py   (a quiet machine; one thread; about five minutes)

All take turns of 20 steps, one refresh of Shampoo and SOAP each, so that a busy moment meets all; medians of the turns.
"""

from __future__ import annotations

import csv
import statistics
import time

import torch
from compare import BATCH, DTYPES, HERE, Compared, Run
from contenders import CONTENDERS
from data import mnist_5k
from torch import Tensor

STEPS, TURNS = 20, 5


def turn(model: Compared, optimizer: torch.optim.Optimizer, images: Tensor) -> tuple[float, float]:
    """Milliseconds a step: of all, and of the optimizer alone."""
    began, inside = time.perf_counter(), 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        model.loss(images[step * BATCH % 5000 :][:BATCH]).backward()
        before = time.perf_counter()
        optimizer.step()
        inside += time.perf_counter() - before
    return 1e3 * (time.perf_counter() - began) / STEPS, 1e3 * inside / STEPS


def main() -> None:
    torch.set_num_threads(1)
    images = mnist_5k()
    with (HERE / "timing.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["dtype", "optimizer", "milliseconds", "optimizer_milliseconds"])
        for dtype in DTYPES:
            torch.manual_seed(0)
            models = {name: Compared(Run("mnist", dtype, name, 1e-4, 0)) for name in CONTENDERS}
            optimizers = {name: CONTENDERS[name].make(model.parameters(), 1e-4) for name, model in models.items()}
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
            for index in range(TURNS + 1):
                for name, model in models.items():
                    found = turn(model, optimizers[name], images)
                    if index:  # the first warms up
                        times[name].append(found)
            for name, rows in times.items():
                whole, inside = (statistics.median(values) for values in zip(*rows, strict=True))
                print(f"{dtype:9} {name:19} {whole:7.1f} ms, of which {inside:6.1f} in the optimizer", flush=True)
                writer.writerow([dtype, name, f"{whole:.2f}", f"{inside:.2f}"])


if __name__ == "__main__":
    main()
