"""What the recorded runs say: the final loss, when it was reached, and a picture."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

WINDOW = 20  # steps in one pass over the digits: one batch's loss is too noisy to compare


@dataclass(frozen=True)
class Run:
    """Args: seconds, loss: one entry a step; loss is the mean of the last WINDOW steps (fewer at the beginning)."""

    name: str
    seconds: np.ndarray
    loss: np.ndarray

    @property
    def milliseconds_per_step(self) -> float:
        return 1000 * float(self.seconds[-1]) / len(self.seconds)

    def reaches(self, target: float) -> tuple[int, float] | None:
        """The first step, and its seconds, at which the loss is at most `target`."""
        below = np.flatnonzero(self.loss <= target)
        below = below[below >= WINDOW - 1]
        return (int(below[0]) + 1, float(self.seconds[below[0]])) if below.size else None


def read_run(path: Path, name: str) -> Run:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    loss = np.array([float(row["loss"]) for row in rows])
    sums = np.concatenate([[0.0], loss.cumsum()])
    ends = np.arange(1, len(loss) + 1)
    starts = np.maximum(0, ends - WINDOW)
    return Run(name, np.array([float(row["seconds"]) for row in rows]), (sums[ends] - sums[starts]) / (ends - starts))


def table(runs: list[Run], target: float) -> str:
    lines = [f"{'':10} {'final loss':>10} {'ms/step':>8}   to {target:.1f} (AdamW's final loss)"]
    for run in runs:
        reached = run.reaches(target)
        when = f"{reached[0]:4d} steps, {reached[1]:5.1f} s" if reached else "not reached"
        lines.append(f"{run.name:10} {run.loss[-1]:10.1f} {run.milliseconds_per_step:8.0f}   {when}")
    return "\n".join(lines)


def picture(runs: list[Run], target: float, digits: dict[str, torch.Tensor], path: Path) -> None:
    """Loss against steps and against seconds; below, a row of digits for each key of `digits` ([count, 784])."""
    figure = Figure(figsize=(10, 4 + 0.75 * len(digits)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4, 0.75 * len(digits)])
    axes = top.subplots(1, 2, sharey=True)
    for run in runs:
        axes[0].plot(np.arange(1, len(run.loss) + 1), run.loss, label=run.name)
        axes[1].plot(run.seconds, run.loss, label=run.name)
    for axis, label in zip(axes, ("steps", "seconds of training (refreshes included)"), strict=True):
        axis.axhline(target, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel(f"loss per digit, mean of {WINDOW} steps")
    axes[0].legend()
    for axis, (name, images) in zip(np.atleast_1d(bottom.subplots(len(digits), 1)), digits.items(), strict=True):
        axis.imshow(images.reshape(-1, 28, 28).permute(1, 0, 2).reshape(28, -1), cmap="gray_r", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=130)
