"""The table of the findings (method, order, success cases, scalable?) and that of every tuned point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cells import Cell, Study
from names import Names
from records import CLOCKS
from scaling import Scaling
from verdicts import Entry
from wording import amount


@dataclass(frozen=True)
class Table:
    """Args: header: of the columns. rows: a text for each column."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        lines = [" | ".join(self.header), "|".join("---" for _ in self.header)]
        return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in self.rows)])


def success_table(entries: Sequence[Entry], names: Names) -> Table:
    """Success cases are pairs of task and batch size, by the rules of ``thresholds.py``; numbers stand behind words."""
    rows = []
    for entry in entries:
        scaling = "; ".join(f"{names.tasks[t]} {_critical(s)}" for t, s in entry.scaling.items())
        rows.append(
            (
                names.methods[entry.method],
                "first" if entry.order == 1 else "second",
                _counts({t: counts for t, counts in entry.reached.items()}, names),
                _successes(entry, "steps", names),
                _successes(entry, "seconds", names),
                f"{entry.scalable.value} ({scaling})",
            )
        )
    last = "scalable? (largest B that scales)"
    return Table(("method", "order", "target reached", "success in steps", "success in seconds", last), rows)


def _counts(counts: dict[str, tuple[int, int]], names: Names) -> str:
    done, whole = sum(a for a, _ in counts.values()), sum(b for _, b in counts.values())
    detail = ", ".join(f"{names.tasks[task]} {a}/{b}" for task, (a, b) in counts.items())
    return f"{done} of {whole} ({detail})"


def _successes(entry: Entry, measure: str, names: Names) -> str:
    if entry.order == 1:
        return "compared with"
    return _counts({task: found[measure] for task, found in entry.successes.items()}, names)


def _critical(scaling: Scaling) -> str:
    if not scaling.decided:
        return "too few sizes"
    if scaling.reach is None:
        return f"none: no target at {scaling.smallest}"
    times = f"{scaling.reach.holds} = {scaling.reach.holds // scaling.smallest} B0"
    return times if scaling.reach.stops else f"{times}, the largest run"


def tuned_table(study: Study, task: str, names: Names) -> Table:
    """Every tuned point of a task: settings and what the target costs, median over the seeds (lowest to highest)."""
    rows = []
    for method, label in names.methods.items():
        for size in study.batch_sizes(task):
            cell = study.cells.get((task, method, size))
            if cell is None:
                rows.append((label, str(size), "not run", *[""] * (len(CLOCKS) + 2)))
                continue
            tuned = ", ".join(f"{name} {value:g}" for name, value in (cell.tuned or {}).items())
            finals = sorted(cell.final_losses())
            losses = f"{finals[0]:.3g} to {finals[-1]:.3g}" if finals else ""
            costs = [_cost(cell, measure) for measure in CLOCKS]
            rows.append((label, str(size), tuned or "all diverged or failed", str(len(cell.runs)), *costs, losses))
    return Table(("method", "batch", "tuned", "seeds", *CLOCKS, "final loss"), rows)


def _cost(cell: Cell, measure: str) -> str:
    spread = cell.to_target(measure)
    if not spread.found:
        return f"> {amount(cell.spent(measure))} ({spread.reached} of {spread.count} seeds)"
    if spread.count == 1:
        return amount(spread.median)
    high = amount(spread.high) if spread.reached == spread.count else "never"
    return f"{amount(spread.median)} ({amount(spread.low)} to {high})"
