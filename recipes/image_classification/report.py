"""The tables and the picture of compare.py's runs: comparison/README.md and comparison/comparison.png.

python recipes/image_classification/report.py
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from statistics import mean, median

from compare import HERE, Run, read_runs
from contenders import CONTENDERS, LADDERS, TARGETS, Contender
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """The runs of one contender that differ in their seed alone. Args: second: the contender's, if it is tuned."""

    runs: list[Run]
    second: str = ""

    @property
    def settings(self) -> str:
        """What was tuned."""
        s = self.runs[0].settings
        return f"lr {s.lr:g}" + (f", {self.second} {getattr(s, self.second):g}" if self.second else "")

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
        if contender.owns(run.settings):
            groups.setdefault(replace(run.settings, seed=0), []).append(run)
    return [Cell(group, contender.second if contender.values else "") for group in groups.values()]


def seconds_per_step(some: list[Cell]) -> float:
    """As compare_timing.py measured it in turns; else the median of the runs, which other work may have disturbed."""
    if (HERE / "timing.csv").exists():
        with (HERE / "timing.csv").open(newline="") as file:
            known = {line["contender"]: float(line["milliseconds"]) / 1000 for line in csv.DictReader(file)}
        for name, seconds in known.items():
            if name in CONTENDERS and CONTENDERS[name].owns(some[0].runs[0].settings):
                return seconds
    return median(run.rows[-1].seconds / run.rows[-1].step for cell in some for run in cell.runs)


def soonest(some: list[Cell], target: float) -> tuple[Cell, float, float] | None:
    """The cell that reaches the target in the fewest steps, and its steps and epochs."""
    reached = [(cell, *found) for cell in some if (found := cell.reaches(target)) is not None]
    return min(reached, key=lambda entry: entry[1]) if reached else None


def first_table(groups: dict[str, list[Cell]]) -> list[str]:
    lines = [
        "| | target | steps to it | epochs | seconds | with | ms/step | best validation | test | with |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, some in groups.items():
        target, best = CONTENDERS[name].target, max(some, key=lambda cell: cell.accuracy)
        each, found = seconds_per_step(some), soonest(some, target)
        way = "- | - | - | -"
        if found is not None:
            cell, steps, epochs = found
            way = f"{steps:.0f} | {epochs:.2f} | {steps * each:.0f} | {cell.budget} epochs, {cell.settings}"
        lines.append(
            f"| {name} | {target:.0%} | {way} | {1000 * each:.0f} | {best.accuracy:.2%} | {best.test_accuracy:.2%} | "
            f"{best.budget} epochs, {best.settings} |"
        )
    return [*lines, ""]


def ladder_tables(groups: dict[str, list[Cell]]) -> list[str]:
    """The fewest epochs of all runs to each of several accuracies: one threshold alone says little."""
    lines: list[str] = []
    for size, ladder in LADDERS.items():
        lines += [
            f"## Fewest epochs to an accuracy, batch {size}",
            "",
            "| | " + " | ".join(f"{accuracy:.1%}" for accuracy in ladder) + " |",
            "|---" * (len(ladder) + 1) + "|",
        ]
        for name, some in groups.items():
            if some[0].runs[0].settings.batch_size == size:
                found = [soonest(some, accuracy) for accuracy in ladder]
                lines.append(f"| {name} | " + " | ".join("-" if f is None else f"{f[2]:.2f}" for f in found) + " |")
        lines.append("")
    return lines


def budget_table(groups: dict[str, list[Cell]]) -> list[str]:
    lines = [
        "## Every run",
        "",
        "| | epochs | | validation | test | epochs to the target |",
        "|---|---|---|---|---|---|",
    ]
    for name, some in groups.items():
        for cell in sorted(some, key=lambda c: (c.budget, c.settings)):
            found = cell.reaches(CONTENDERS[name].target)
            seeds = f", {len(cell.runs)} seeds" if len(cell.runs) > 1 else ""
            lines.append(
                f"| {name} | {cell.budget} | {cell.settings}{seeds} | {cell.accuracy:.2%} | {cell.test_accuracy:.2%} | "
                f"{'-' if found is None else f'{found[1]:.2f}'} |"
            )
    return [*lines, ""]


def kind(name: str) -> str:
    """A contender without its batch size: what has one colour."""
    return name.rpartition(",")[0]


def picture(groups: dict[str, list[Cell]]) -> None:
    """Validation accuracy against steps and seconds, a row for each batch size; the run soonest at the target."""
    sizes = sorted({cell.runs[0].settings.batch_size for some in groups.values() for cell in some})
    kinds = list(dict.fromkeys(kind(name) for name in CONTENDERS))
    figure = Figure(figsize=(11, 4 * len(sizes)), layout="constrained")
    for row, size in zip(figure.subplots(len(sizes), 2, sharey="row", squeeze=False), sizes, strict=True):
        target = TARGETS[size]
        for name, some in groups.items():
            if some[0].runs[0].settings.batch_size != size:
                continue
            found = soonest(some, target)
            rows = (found[0] if found else max(some, key=lambda c: c.accuracy)).runs[0].rows
            each, steps = seconds_per_step(some), [r.step for r in rows]
            accuracies, colour = [r.validation_accuracy for r in rows], f"C{kinds.index(kind(name))}"
            row[0].plot(steps, accuracies, label=name, color=colour)
            row[1].plot([step * each for step in steps], accuracies, label=name, color=colour)
        for axis, label in zip(row, ("steps", "seconds of training"), strict=True):
            axis.axhline(target, color="grey", linewidth=0.8, linestyle="--")
            axis.set_xlabel(f"{label}, batch {size}")
            axis.set_ylim(target - 0.2, min(1.0, target + 0.05))
            axis.grid(alpha=0.3)
        row[0].set_ylabel("validation accuracy")
        row[0].legend(loc="lower right", fontsize="small")
    figure.savefig(HERE / "comparison.png", dpi=110)


def main() -> None:
    runs = list(read_runs().values())
    groups = {name: some for name, contender in CONTENDERS.items() if (some := cells(contender, runs))}
    if not groups:
        raise SystemExit("no runs yet: python recipes/image_classification/compare.py")
    head = [
        "# SGD, Shampoo and K-FAC to a target accuracy",
        "",
        "Written by report.py; what it means stands in ../README.md.",
        "",
    ]
    lines = [*head, *first_table(groups), "![validation accuracy](comparison.png)", ""]
    lines += [*ladder_tables(groups), *budget_table(groups)]
    (HERE / "README.md").write_text("\n".join(lines).rstrip() + "\n")
    picture(groups)
    print("\n".join(first_table(groups)))


if __name__ == "__main__":
    main()
