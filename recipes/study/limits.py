"""What bounds the findings: what was run, where, at what cost, and what is missing or at an edge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cells import Study
from names import Names
from sensitivity import tuned_at_edges
from thresholds import LEAST_SEEDS
from wording import listed, plural

LISTED = 12  # more than this many are counted


def runs_and_cost(study: Study, names: Names) -> list[str]:
    """Counts of runs, core-hours, machine, versions, data."""
    records = study.records
    stages = Counter(record.stage for record in records)
    points = [
        f"{plural(len(records), 'run')} ({stages['grid']:,} of the grids, {stages['seeds']:,} further seeds); "
        f"{sum(record.diverged for record in records):,} diverged, "
        f"{sum(record.error is not None for record in records):,} failed.",
        f"{sum(r.seconds for r in records) / 3600:.2f} core-hours of processor time in training, one thread a run "
        f"({sum(r.wall_seconds for r in records) / 3600:.2f} hours by the clock); evaluation and start-up not counted.",
    ]
    for task in names.tasks:
        mine = [record for record in records if record.task == task]
        sizes, seeds = study.batch_sizes(task), sorted({record.seed for record in mine})
        grids = sorted({len(cell.grid) for cell in study.cells.values() if cell.task == task})
        epochs = sorted({record.epochs for record in mine})
        points.append(
            f"{names.tasks[task]}{_data(mine)}: batch sizes {listed(sizes)}; {_span(epochs)} epochs; "
            f"grids of {listed(grids)} points; seeds {listed(seeds)}."
        )
    for name in ("machine", "version", "commit"):
        values = sorted({getattr(record, name) for record in records} - {""})
        if values:
            points.append(f"{name.capitalize()}{'s' if len(values) > 1 else ''}: {'; '.join(values)}.")
    return points


def _data(records: Sequence[object]) -> str:
    found = sorted({str(getattr(record, "data", "")) for record in records} - {""})
    return f" ({listed(found)})" if found else ""


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def edges(study: Study, names: Names) -> list[str]:
    """Tuned points at an edge of the grid: a better setting may lie outside."""
    found = tuned_at_edges(study)
    cells = sum(cell.tuned is not None for cell in study.cells.values())
    points = {(task, method, size) for task, method, size, _ in found}
    lines = [f"{len(points)} of {cells} tuned points lie at an edge of their grid: a better one may lie outside it."]
    for task in names.tasks:
        words = [f"{names.methods[m]} at {b} ({where})" for t, m, b, where in found if t == task]
        if words:
            lines.append(f"At an edge, {names.tasks[task]}: {'; '.join(words)}.")
    return lines


def missing(study: Study, names: Names) -> list[str]:
    """Cells that were not run, grids that are not whole, tuned points with too few seeds."""
    lines = []
    for task in names.tasks:
        whole = max(len(cell.grid) for cell in study.cells.values() if cell.task == task)
        absent, part, few = [], [], []
        count = len(names.methods) * len(study.batch_sizes(task))
        for method, label in names.methods.items():
            for size in study.batch_sizes(task):
                cell = study.cells.get((task, method, size))
                if cell is None:
                    absent.append(f"{label} at {size}")
                elif len(cell.grid) < whole:
                    part.append(f"{label} at {size} ({len(cell.grid)} of {whole})")
                elif cell.runs and len(cell.runs) < LEAST_SEEDS:
                    few.append(f"{label} at {size} ({len(cell.runs)})")
        for words, text in (
            (absent, "not run"),
            (part, "grids not whole"),
            (few, f"tuned points with fewer than {LEAST_SEEDS} seeds"),
        ):
            if len(words) > LISTED:
                lines.append(f"Missing, {names.tasks[task]}, {text}: {len(words)} of {count}.")
            elif words:
                lines.append(f"Missing, {names.tasks[task]}, {text}: {'; '.join(words)}.")
    return lines


STANDING = [
    "One machine; seconds are processor time of one thread, beside other runs that share its caches. They say nothing "
    "about parallel hardware, on which a large batch costs less than its samples.",
    "Small networks and data sets: other sizes may order the methods otherwise.",
    "The setting is tuned by one seed, which counts among the seeds: its run is the best of the grid by chance too. "
    "Grids are of equal size, but the best of several second-order methods is chosen from more runs than the best "
    "first-order one.",
    "With three seeds each, two methods that are alike are told apart by the rule above in about six of a hundred "
    "comparisons, by chance alone (normal noise).",
    "It is harder to be within a factor of the best final loss where that is near zero: the share compares batch sizes "
    "of one method rather than methods.",
    "Learning rates are constant; targets are training losses: nothing is said about generalisation.",
]


def limits(study: Study, names: Names) -> list[str]:
    return [*runs_and_cost(study, names), *missing(study, names), *edges(study, names), *STANDING]
