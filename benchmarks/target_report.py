"""What is known of time to target, as tables and a picture: of the runs that are stored, without running any."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from clock import Clock, Entry, Timed, median_times
from contenders import Contender
from measure import processor, spread
from search import Missing, Search
from trained_tasks import TrainedTask
from training import WARM_UP


@dataclass(frozen=True)
class Found:
    """What the search says of one contender.

    Attributes:
        point: learning rate and horizon of its shortest run that ends at the target; None if there is none.
        longest: its best run of the longest horizon.
        fewest: by target that was searched, steps of its shortest run that ends there; None if there is none.
    """

    search: Search
    point: Entry | None
    longest: Entry
    final: float
    fewest: dict[float, int | None]
    curve: list[tuple[int, float]]

    @property
    def name(self) -> str:
        return self.longest.contender.name

    def processors(self) -> list[str]:
        """On which its best longest run and its shortest one were found."""
        points = {(entry.lr, entry.horizon) for entry in (self.longest, self.point) if entry is not None}
        return sorted({processor(self.search.row(*point).get("where", "")) for point in points})


def found_of(search: Search, contender: Contender, targets: Sequence[float], own: Sequence[float]) -> Found:
    """From the store, or by running what is missing if the search has a runner.

    Args:
        contender: whose clock it is; that of the search unless they share a method.
        own: the target by seed, AdamW's final losses.

    Raises:
        Missing: a run is not there, and the search has no runner.
    """
    lr, final = search.best(search.longest)
    fewest: dict[float, int | None] = {}
    for target in targets:
        try:
            fewest[target] = search.fewest(target)
        except Missing:  # a further target may be left out, not AdamW's own
            continue
    point = search.confirmed(list(own))
    return Found(
        search=search,
        point=Entry(contender, *point) if point else None,
        longest=Entry(contender, lr, search.longest),
        final=final,
        fewest=fewest,
        curve=search.row(lr, search.longest)["curve"],
    )


def complete(
    searches: Sequence[tuple[Search, Contender]], targets: Sequence[float], own: Sequence[float]
) -> list[Found]:
    """Of those whose search is complete. Args: searches: with the contender that is clocked."""
    found = []
    for search, contender in searches:
        try:
            found.append(found_of(search, contender, targets, own))
        except Missing:
            continue
    return found


def tables(task: TrainedTask, everyone: Sequence[Found], clock: Clock, own: Sequence[float], where: str) -> list[str]:
    """The page of results.

    Args:
        own: final losses of AdamW's best longest run, by seed.
        where: machine and commit, for the head while nothing is clocked.
    """
    longest = everyone[0].longest.horizon
    lines = [
        f"# Time to AdamW's final loss: {task.key}",
        "",
        *_machines(everyone, clock, where),
        f"{task.title[0].upper()}{task.title[1:]}. Warm-up over {max(1, round(WARM_UP * task.longest))} steps at every "
        "horizon, then linear decay to zero, fitted to it; betas (0.9, 0.99).",
        f"Target: {own[0]:.5g}, where AdamW's best run of {longest} steps ends "
        f"(seeds: {', '.join(f'{loss:.5g}' for loss in own)}). Seconds from before the optimizer is made until its "
        "workers are closed; turns of everybody, seeds in turn; median [smallest, largest].",
        "",
        "## Schedules fitted to each one's own budget",
        "",
        "| | best lr | steps | loss there, by seed | seeds that reach AdamW's | seconds "
        f"| AdamW foreach's seconds / its own | loss after {longest} steps (lr) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in everyone:
        final = f"{found.final:.5g} ({found.longest.lr:g})"
        if found.point is None:
            lines.append(f"| {found.name} | - | not in {longest} | | | | | {final} |")
            continue
        runs = clock.runs(found.point)
        head = f"| {found.name} | {found.point.lr:g} | {found.point.horizon} | "
        if not runs:
            lines.append(f"{head}| | not yet | | {final} |")
            continue
        by_seed = {run.seed: run for run in runs}
        losses = ", ".join(f"{run.loss:.5g}" for _, run in sorted(by_seed.items()))
        reached = sum(run.loss <= own[seed] for seed, run in by_seed.items())
        lines.append(
            f"{head}{losses} | {reached} of {len(by_seed)} | {spread([run.seconds for run in runs])} | "
            f"{spread([run.ratio for run in runs])} ({len(runs)} turns) | {final} |"
        )
    return [*lines, "", *_further(everyone, clock), *_equal_horizons(task, everyone, clock, own)]


def _machines(everyone: Sequence[Found], clock: Clock, where: str) -> list[str]:
    """Where seconds were taken, and losses found: on another processor a run may end 2 % higher or lower."""
    turns = [run for found in everyone for entry in {found.point, found.longest} if entry for run in clock.runs(entry)]
    clocked = sorted({processor(run.where) for run in turns}) or [processor(where)]
    lines = [f"{turns[-1].where if turns else where}."]
    if len(clocked) > 1:
        lines.append(f"Clocked on several machines: {'; '.join(clocked)}.")
    searched: dict[str, list[str]] = {}
    for found in everyone:
        for name in found.processors():
            searched.setdefault(name, []).append(found.name)
    if list(searched) != clocked:
        given = "; ".join(f"on {name}: {', '.join(who)}" for name, who in searched.items())
        lines.append(f"Learning rates, steps and targets were found {given}.")
    return lines


def _further(everyone: Sequence[Found], clock: Clock) -> list[str]:
    targets = list(everyone[0].fewest)
    if not targets:
        return []

    def row(found: Found) -> list[str]:
        times = sorted(median_times(clock.runs(found.longest)).items())
        cells = []
        for target in targets:
            if target not in found.fewest:
                cells.append("not searched")
                continue
            steps = found.fewest[target]
            if steps is None or not times:
                cells.append("-" if steps is None else f"{steps}")
                continue
            # start-up counts, and early steps may cost more than late ones
            seconds = np.interp(steps, *zip(*times, strict=True))
            cells.append(f"{steps}, {seconds:.3g} s")
        return cells

    about = (
        "Steps of the shortest fitted run that ends there (seed 0), and about how many seconds: those after which the "
        "runs of the longest horizon had done as many (interpolated)."
    )
    columns = [f"{target:g}" for target in targets]
    return [*_section("Further targets", about, columns, everyone, row), ""]


def _equal_horizons(task: TrainedTask, everyone: Sequence[Found], clock: Clock, own: Sequence[float]) -> list[str]:
    longest, targets = everyone[0].longest.horizon, [own[0], *everyone[0].fewest]

    def row(found: Found) -> list[str]:
        runs = clock.runs(found.longest)
        times = median_times(runs)
        cells = ["not yet"]
        if runs:
            cells = [f"{1000 * statistics.median(run.seconds for run in runs) / longest:.1f} ({len(runs)})"]
        for target in targets:
            step = next((step for step, loss in found.curve if loss <= target), None)
            cells.append("-" if step is None else f"{step}, {times[step]:.3g} s" if step in times else f"{step}")
        return cells

    title = f"Equal horizons: everybody's best run of {longest} steps"
    about = "Steps and seconds until the curve (a point every 2 % of the steps) is at or below; medians over turns."
    columns = ["ms/step (turns)", *(f"{target:.5g}" for target in targets)]
    lines = _section(title, about, columns, everyone, row)
    return [*lines, "", f"![loss over seconds](time_to_target_{task.key}.png)"]


def _section(
    title: str, about: str, columns: Sequence[str], everyone: Sequence[Found], row: Callable[[Found], list[str]]
) -> list[str]:
    head = ["", *columns]
    rows = [f"| {found.name} | " + " | ".join(row(found)) + " |" for found in everyone]
    return [f"## {title}", "", about, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows]


def picture(task: TrainedTask, everyone: Sequence[Found], clock: Clock, own: Sequence[float], path: Path) -> None:
    """Loss over seconds at equal horizons, of those that are clocked; over steps where nobody is yet."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed: list[tuple[Found, list[Timed]]] = [(found, clock.runs(found.longest)) for found in everyone]
    seconds = any(runs for _, runs in timed)
    if seconds:
        timed = [(found, runs) for found, runs in timed if runs]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for found, runs in timed:
        times = median_times(runs)
        points = [
            (times[step] if seconds else step, loss) for step, loss in found.curve if not seconds or step in times
        ]
        axes.plot(*zip(*points, strict=True), label=found.name, linewidth=2 if "ours" in found.name else 1)
    axes.axhline(own[0], color="grey", linewidth=0.8, linestyle=":")
    lowest = min((loss for found in everyone for _, loss in found.curve))
    span = max(own[0] - lowest, 0.3 * abs(own[0]))
    axes.set_ylim(lowest - 0.05 * span, own[0] + 2 * span)
    horizon = everyone[0].longest.horizon
    axes.set_xlabel(f"seconds ({horizon} steps each)" if seconds else f"steps of {horizon}")
    axes.set_ylabel("loss")
    axes.set_title(task.key)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
