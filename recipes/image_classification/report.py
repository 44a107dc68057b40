"""The tables and the picture of compare.py's runs: comparison/README.md and comparison/comparison.png.

python recipes/image_classification/report.py [--target-accuracy 0.9]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from statistics import mean, median

from compare import HERE, Run, read_runs
from contenders import CONTENDERS, Contender
from matplotlib.figure import Figure

TARGET = 0.9


@dataclass(frozen=True)
class Cell:
    """The runs of one contender that differ in their seed alone."""

    runs: list[Run]

    @property
    def settings(self) -> str:
        """What was tuned."""
        s = self.runs[0].settings
        return f"lr {s.lr:g}" + (f", damping {s.damping:g}" if s.optimizer == "kfac" else "")

    @property
    def budget(self) -> int:
        return self.runs[0].settings.epochs

    @property
    def accuracy(self) -> float:
        return mean(run.accuracy for run in self.runs)

    @property
    def test_accuracy(self) -> float:
        return mean(run.test_accuracy for run in self.runs)

    def reaches(self, target: float) -> tuple[float, float] | None:
        """Mean steps and epochs to the target; None if a seed does not reach it."""
        rows = [run.reaches(target) for run in self.runs]
        found = [row for row in rows if row is not None]
        return (mean(r.step for r in found), mean(r.epoch for r in found)) if len(found) == len(rows) else None


def cells(contender: Contender, runs: list[Run]) -> list[Cell]:
    groups: dict[object, list[Run]] = {}
    for run in runs:
        s = run.settings
        if replace(contender.base, epochs=s.epochs, lr=s.lr, damping=s.damping, seed=s.seed) == s:
            groups.setdefault(replace(s, seed=0), []).append(run)
    return [Cell(group) for group in groups.values()]


def seconds_per_step(some: list[Cell]) -> float:
    """Median over the runs: other work on the machine disturbs single ones."""
    return median(run.rows[-1].seconds / run.rows[-1].step for cell in some for run in cell.runs)


def soonest(some: list[Cell], target: float) -> tuple[Cell, float, float] | None:
    """The cell that reaches the target in the fewest steps, and its steps and epochs."""
    reached = [(cell, *found) for cell in some if (found := cell.reaches(target)) is not None]
    return min(reached, key=lambda entry: entry[1]) if reached else None


def first_table(groups: dict[str, list[Cell]], target: float) -> list[str]:
    lines = [
        f"| | steps to {target:.1%} | epochs | seconds | with | ms/step | best validation | test | with |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, some in groups.items():
        each, best, found = seconds_per_step(some), max(some, key=lambda cell: cell.accuracy), soonest(some, target)
        way = "- | - | - | -"
        if found is not None:
            cell, steps, epochs = found
            way = f"{steps:.0f} | {epochs:.2f} | {steps * each:.0f} | {cell.budget} epochs, {cell.settings}"
        lines.append(
            f"| {name} | {way} | {1000 * each:.0f} | {best.accuracy:.2%} | {best.test_accuracy:.2%} | "
            f"{best.budget} epochs, {best.settings} |"
        )
    return [*lines, ""]


def budget_table(groups: dict[str, list[Cell]], target: float) -> list[str]:
    lines = [
        "## Every run",
        "",
        f"| | epochs | | validation | test | epochs to {target:.1%} |",
        "|---|---|---|---|---|---|",
    ]
    for name, some in groups.items():
        for cell in sorted(some, key=lambda c: (c.budget, c.settings)):
            found = cell.reaches(target)
            seeds = f", {len(cell.runs)} seeds" if len(cell.runs) > 1 else ""
            lines.append(
                f"| {name} | {cell.budget} | {cell.settings}{seeds} | {cell.accuracy:.2%} | {cell.test_accuracy:.2%} | "
                f"{'-' if found is None else f'{found[1]:.2f}'} |"
            )
    return [*lines, ""]


def picture(groups: dict[str, list[Cell]], target: float) -> None:
    """Validation accuracy against steps and seconds, a row for each batch size; the run soonest at the target."""
    sizes = sorted({cell.runs[0].settings.batch_size for some in groups.values() for cell in some})
    figure = Figure(figsize=(11, 4 * len(sizes)), layout="constrained")
    for row, size in zip(figure.subplots(len(sizes), 2, sharey=True, squeeze=False), sizes, strict=True):
        for name, some in groups.items():
            if some[0].runs[0].settings.batch_size != size:
                continue
            found = soonest(some, target)
            rows = (found[0] if found else max(some, key=lambda c: c.accuracy)).runs[0].rows
            each, steps = seconds_per_step(some), [r.step for r in rows]
            accuracies = [r.validation_accuracy for r in rows]
            row[0].plot(steps, accuracies, label=name)
            row[1].plot([step * each for step in steps], accuracies, label=name)
        for axis, label in zip(row, ("steps", "seconds of training"), strict=True):
            axis.axhline(target, color="grey", linewidth=0.8, linestyle="--")
            axis.set_xlabel(f"{label}, batch {size}")
            axis.set_ylim(max(0.0, 2 * target - 1.0 - 0.1), None)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("validation accuracy")
        row[0].legend()
    figure.savefig(HERE / "comparison.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target-accuracy", type=float, default=TARGET)
    target = parser.parse_args().target_accuracy
    runs = list(read_runs().values())
    groups = {name: some for name, contender in CONTENDERS.items() if (some := cells(contender, runs))}
    if not groups:
        raise SystemExit("no runs yet: python recipes/image_classification/compare.py")
    head = [
        "# SGD and K-FAC to a target accuracy",
        "",
        "Written by report.py; what it means stands in ../README.md.",
        "",
    ]
    lines = [*head, *first_table(groups, target), "![validation accuracy](comparison.png)", ""]
    (HERE / "README.md").write_text("\n".join([*lines, *budget_table(groups, target)]).rstrip() + "\n")
    picture(groups, target)
    print("\n".join(first_table(groups, target)))


if __name__ == "__main__":
    main()
