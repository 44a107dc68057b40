"""The table and the pictures of compare.py's runs: comparison/README.md and comparison.png.

python recipes/autoencoder/compare_report.py
"""

from __future__ import annotations

import csv
from dataclasses import dataclass

import numpy as np
from compare import BATCH, DTYPES, EVERY, GRID, HERE, SEEDS, STEPS, WINDOW, Result, best, read_results
from contenders import CONTENDERS
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

INTRODUCTION = f"""784-1000-500-250-30-250-500-1000-784, tanh, cross-entropy summed over pixels; {STEPS} steps of batch
{BATCH}, 5 % warm-up, linear decay to zero. Each optimizer with its defaults of then (running means at 0.9 and 0.99
where it has them); its learning rate from a grid of {GRID} values (1, 3, 10, ...), extended while the best value
is at an edge, by the mean training loss of the last {WINDOW} steps at seed 0; then {SEEDS} seeds, mean and standard
deviation. Losses are per picture, after the last step. `bfloat16`: weights, gradients and torch's moments in
bfloat16, statistics in float32.

Shampoo and SOAP, of before their present defaults, refresh every 20 steps, in the step itself, and keep whole
matrices; Shampoo's exponent is the papers'. State counts every tensor that the optimizer saves. Times:
one thread of an AMD EPYC, all optimizers in turns, refreshes included; seconds are steps times that. The target is
AdamW's own final loss, mean of its seeds."""
TASKS = {"mnist": "MNIST (4,000 digits, 1,000 for validation)", "fashion": "Fashion-MNIST (60,000, 10,000)"}


@dataclass(frozen=True)
class Cell:
    """One optimizer on one task in one dtype, at its best learning rate.

    Args:
        results: one for each seed.
        curves: ``(seeds, points)``, the mean loss of the last WINDOW steps at every EVERY-th step.
        grid: learning rates tried, with their final losses.
    """

    results: list[Result]
    curves: np.ndarray
    grid: dict[float, float]

    def mean(self, name: str) -> tuple[float, float]:
        values = [getattr(result, name) for result in self.results]
        return float(np.mean(values)), float(np.std(values))

    def steps_to(self, target: float) -> float | None:
        """Mean over the seeds of the first step whose running mean is at most `target`; None if one never is."""
        below = self.curves <= target
        below[:, : WINDOW // EVERY - 1] = False  # the window is not full yet
        return float(np.mean((below.argmax(1) + 1) * EVERY)) if below.any(1).all() else None


def read_cells() -> dict[tuple[str, str, str], Cell]:
    results = read_results()
    curves: dict[tuple[str, ...], list[float]] = {}
    with (HERE / "curves.csv").open(newline="") as file:
        for *key, values in ((*row[:5], row[5:]) for row in csv.reader(file)):
            curves[tuple(key)] = [float(value) for value in values]
    cells = {}
    for task in TASKS:
        for dtype in DTYPES:
            for name in CONTENDERS:
                mine = [r for r in results if (r.task, r.dtype, r.optimizer) == (task, dtype, name)]
                found = best([r for r in mine if r.seed == 0])
                if found is None:
                    continue
                seeds = [r for r in mine if r.lr == found.lr]
                rows = [curves[task, dtype, name, f"{r.lr:g}", str(r.seed)] for r in seeds]
                cells[task, dtype, name] = Cell(seeds, np.array(rows), {r.lr: r.running for r in mine if r.seed == 0})
    return cells


def read_timing() -> dict[tuple[str, str], tuple[float, float]]:
    with (HERE / "timing.csv").open(newline="") as file:
        return {
            (row["dtype"], row["optimizer"]): (float(row["milliseconds"]), float(row["optimizer_milliseconds"]))
            for row in csv.DictReader(file)
        }


def table(task: str, dtype: str, cells: dict[tuple[str, str, str], Cell]) -> list[str]:
    timing = read_timing()
    target = cells[task, dtype, "AdamW"].mean("running")[0]
    parameters = cells[task, "float32", "SGD, momentum"].results[0].state_bytes / 4
    lines = [
        f"## {TASKS[task]}, {dtype}",
        "",
        f"| optimizer | lr | training loss | validation loss | state, bytes a parameter | ms/step (optimizer) | "
        f"steps to {target:.1f} | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CONTENDERS:
        cell = cells.get((task, dtype, name))
        if cell is None:
            lines.append(f"| {name} | - | diverged | | | | | |")
            continue
        (train, spread), (validation, other) = cell.mean("train"), cell.mean("validation")
        whole, inside = timing[dtype, name]
        steps = STEPS if name == "AdamW" else cell.steps_to(target)
        reached = f"{steps:.0f} | {steps * whole / 1e3:.1f}" if steps is not None else "- | -"
        lines.append(
            f"| {name} | {cell.results[0].lr:g} | {train:.1f} ± {spread:.1f} | {validation:.1f} ± {other:.1f} | "
            f"{cell.results[0].state_bytes / parameters:.1f} | {whole:.0f} ({inside:.1f}) | {reached} |"
        )
    return [*lines, ""]


def grids(cells: dict[tuple[str, str, str], Cell]) -> list[str]:
    lines = ["## Every learning rate tried", "", "Mean loss of the last 20 steps, seed 0.", ""]
    for (task, dtype, name), cell in cells.items():
        tried = ", ".join(f"{lr:g}: {loss:.1f}" for lr, loss in sorted(cell.grid.items()))
        lines.append(f"- {task}, {dtype}, {name}: {tried}")
    return [*lines, ""]


def picture(cells: dict[tuple[str, str, str], Cell]) -> None:
    """Loss against steps and against seconds, float32, mean of the seeds."""
    timing = read_timing()
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    ours = ("SONew", "Shampoo", "SOAP")
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for row, (task, title) in zip(axes, TASKS.items(), strict=True):
        finals = []
        for index, name in enumerate(CONTENDERS):
            cell = cells.get((task, "float32", name))
            if cell is None:
                continue
            loss = cell.curves.mean(0)
            steps = np.arange(1, len(loss) + 1) * EVERY
            style = {"linestyle": "-" if name.startswith(ours) else "--", "color": colors[index]}
            row[0].plot(steps, loss, label=name, **style)
            row[1].plot(steps * timing["float32", name][0] / 1e3, loss, **style)
            finals.append(loss[-1])
        row[0].set_title(title, fontsize=10)
        row[0].set_ylabel(f"training loss, mean of {WINDOW} steps")
        row[0].set_ylim(0.92 * min(finals), 2.0 * float(np.median(finals)))
        slowest = sorted(timing["float32", name][0] for name in CONTENDERS)[-3]
        row[1].set_xlim(0, slowest * STEPS / 1e3)
        for axis in row:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_yticks([v for v in (60, 80, 100, 150, 200, 250, 300, 400) if 0.9 * min(finals) < v < 600])
            axis.grid(alpha=0.3)
    axes[1][0].set_xlabel("steps")
    axes[1][1].set_xlabel("seconds of training, one thread (refreshes included)")
    axes[0][1].legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="upper right")
    figure.savefig(HERE / "comparison.png", dpi=110)


def main() -> None:
    cells = read_cells()
    lines = [
        "# Eleven optimizers on the deep autoencoder",
        "",
        INTRODUCTION,
        "",
        "![loss against steps and seconds](comparison.png)",
        "",
    ]
    for dtype in DTYPES:
        for task in TASKS:
            lines += table(task, dtype, cells)
    picture(cells)
    (HERE / "README.md").write_text("\n".join([*lines, *grids(cells)]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
