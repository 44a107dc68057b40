"""Figures over the batch size: what the target costs, speed-up, sensitivity, and the study's main picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from cells import Cell, Study
from headlines import headline_of_sensitivity, headline_of_steps, headline_of_total
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from names import Names
from records import CLOCKS
from scaling import own_speed_up
from sensitivity import shares_of_loss, shares_of_steps, shares_reached
from style import INK, PAPER, batch_axis, legend, line_style, number_axis
from thresholds import SENSITIVITY_STEPS_WITHIN, SENSITIVITY_WITHIN
from verdicts import at_same_batch_size

Shares = Callable[[list[Cell]], dict[int, float | None]]
UNITS = {"steps": "steps", "samples": "samples", "seconds": "CPU seconds, one thread", "propagations": "propagations"}
IDEAL = Line2D([], [], color=INK, linestyle=":", linewidth=1, label="ideal scaling")
OPEN = Line2D([], [], color=INK, marker="o", markerfacecolor=PAPER, linestyle="", label="target not reached")


def draw_cost(axis: Axes, study: Study, task: str, names: Names, measure: str) -> None:
    """What the target costs against batch size: medians, the range over the seeds, and the ideal line of each method.

    An open marker is what was spent without reaching the target: more is needed.
    """
    for method in names.methods:
        cells = study.of_method(task, method)
        style = line_style(method, names)
        if not cells:
            continue
        spreads = [(cell.batch_size, cell.to_target(measure)) for cell in cells]
        heights = [spread.median if spread.found else math.nan for _, spread in spreads]
        axis.plot([size for size, _ in spreads], heights, **style)
        for size, spread in spreads:
            if spread.found and spread.reached > 1:
                top = spread.high if math.isfinite(spread.high) else 3 * spread.median
                axis.plot([size, size], [spread.low, top], color=style["color"], linewidth=3, alpha=0.3)
        lost = [(cell.batch_size, cell.spent(measure)) for cell in cells if not cell.to_target(measure).found]
        if lost:
            marker = {**style, "linestyle": "", "markerfacecolor": PAPER}
            place = list(names.methods).index(method) - len(names.methods) / 2
            shift = 2 ** (0.1 * place)  # equal budgets stand side by side
            axis.plot([size * shift for size, _ in lost], [spent for _, spent in lost], **marker)
        if measure in ("steps", "samples"):
            _ideal(axis, cells, measure, study.batch_sizes(task)[-1], style["color"])
    batch_axis(axis, study.batch_sizes(task))
    number_axis(axis)


def _ideal(axis: Axes, cells: list[Cell], measure: str, largest: int, colour: str) -> None:
    """From the method's smallest batch size that reached the target: steps in inverse proportion, samples level."""
    start = next(((c.batch_size, c.to_target(measure).median) for c in cells if c.to_target(measure).found), None)
    if start is not None and start[0] < largest:
        end = start[1] * (start[0] / largest if measure == "steps" else 1.0)
        axis.plot([start[0], largest], [start[1], end], color=colour, linestyle=":", linewidth=0.9, alpha=0.7, zorder=1)


def cost_figure(study: Study, task: str, names: Names) -> Figure:
    """Steps, samples, seconds and propagations to the target of one task."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    for axis, measure in zip(figure.subplots(2, 2).flat, CLOCKS, strict=True):
        draw_cost(axis, study, task, names, measure)
        headline = headline_of_steps if measure == "steps" else headline_of_total
        axis.set_title(headline(study, task, names, measure))
        axis.set_ylabel(f"{UNITS[measure]} to the target")
        axis.set_xlabel("batch size")
    legend(figure, names, [IDEAL, OPEN], columns=5)
    return figure


def speed_up_figure(study: Study, names: Names) -> Figure:
    """A row for each task: over the method's own smallest batch, and over the best first-order method at each size."""
    figure = Figure(figsize=(9, 0.6 + 2.9 * len(names.tasks)), layout="constrained")
    for part, task in zip(rows(figure, len(names.tasks)), names.tasks, strict=True):
        part.suptitle(names.tasks[task], x=0.01, ha="left", fontweight="bold", fontsize=10)
        sizes = study.batch_sizes(task)
        own, steps, seconds = part.subplots(1, 3)
        for method in names.methods:
            style = line_style(method, names)
            plot_gaps(own, own_speed_up(study.of_method(task, method), sizes[0]), sizes, style)
            for axis, measure in ((steps, "steps"), (seconds, "seconds")):
                if names.orders[method] == 2:
                    found = at_same_batch_size(study, task, method, names.orders, measure)
                    plot_gaps(axis, {c.ours.batch_size: c.times for c in found}, sizes, style)
        own.plot([sizes[0], sizes[-1]], [1, sizes[-1] / sizes[0]], color=INK, linestyle=":", linewidth=1)
        for axis, label in (
            (own, f"speed-up in steps over own batch {sizes[0]}"),
            (steps, "over best first order, in steps"),
            (seconds, "over best first order, in seconds"),
        ):
            axis.axhline(1, color=INK, linewidth=0.8, alpha=0.6)
            axis.set_title(label, fontsize=8.5)
            axis.set_xlabel("batch size")
            batch_axis(axis, sizes)
            number_axis(axis)
    legend(figure, names, [IDEAL], columns=8)
    return figure


def sensitivity_figure(study: Study, names: Names) -> Figure:
    """A row for each task: the share of the grid near the best by final loss, by steps, and that reaches the target."""
    panels = (
        (shares_of_loss, f"final loss within {SENSITIVITY_WITHIN:g} of the best"),
        (shares_of_steps, f"target in {SENSITIVITY_STEPS_WITHIN:g} times the fewest steps"),
        (shares_reached, "target reached at all"),
    )
    figure = Figure(figsize=(9, 0.6 + 3.0 * len(names.tasks)), layout="constrained")
    for part, task in zip(rows(figure, len(names.tasks)), names.tasks, strict=True):
        part.suptitle(names.tasks[task], x=0.01, ha="left", fontweight="bold", fontsize=10)
        axes = part.subplots(1, 3, sharey=True)
        for axis, (shares, label) in zip(axes, panels, strict=True):
            draw_sensitivity(axis, study, task, names, shares)
            headline = headline_of_sensitivity(study, task, names, shares)
            axis.set_title(f"{label}:\n{headline}", fontsize=8.5)
            axis.set_xlabel("batch size")
        axes[0].set_ylabel("share of the grid")
    legend(figure, names)
    return figure


def draw_sensitivity(axis: Axes, study: Study, task: str, names: Names, shares: Shares) -> None:
    """Args: shares: of a method's cells, by batch size."""
    for method in names.methods:
        found = shares(study.of_method(task, method))
        plot_gaps(axis, found, study.batch_sizes(task), line_style(method, names))
    batch_axis(axis, study.batch_sizes(task))
    axis.set_ylim(-0.04, 1.04)


def plot_gaps(axis: Axes, values: Mapping[int, float | None], sizes: list[int], style: dict[str, Any]) -> None:
    """A line with gaps where there is no value."""
    heights = [math.nan if (value := values.get(size)) is None else value for size in sizes]
    axis.plot(sizes, heights, **style)


def rows(figure: Figure, count: int) -> list[Any]:
    """A part of the figure for each task, with some air between the panels."""
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.set(w_pad=0.08, h_pad=0.05)
    return list(figure.subfigures(count, 1, squeeze=False)[:, 0])


def main_figure(study: Study, names: Names) -> Figure:
    """The study in one picture, 900 pixels wide at 100 dpi: steps, seconds and sensitivity, a row for each task."""
    figure = Figure(figsize=(9, 0.75 + 2.75 * len(names.tasks)), layout="constrained")
    for part, task in zip(rows(figure, len(names.tasks)), names.tasks, strict=True):
        target = study.at(task, study.batch_sizes(task)[0])[0].grid[0].target
        title = f"{names.tasks[task]}, to {names.losses[task]} {target:g}"
        part.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        steps, seconds, share = part.subplots(1, 3)
        draw_cost(steps, study, task, names, "steps")
        draw_cost(seconds, study, task, names, "seconds")
        draw_sensitivity(share, study, task, names, shares_of_steps)
        titles = (
            headline_of_steps(study, task, names, "steps"),
            headline_of_total(study, task, names, "seconds"),
            headline_of_sensitivity(study, task, names, shares_of_steps).capitalize(),
        )
        labels = (
            "steps to target",
            "CPU seconds to target",
            f"share within {SENSITIVITY_STEPS_WITHIN:g}x fewest steps",
        )
        for axis, text, label in zip((steps, seconds, share), titles, labels, strict=True):
            axis.set_title(text, fontsize=8.5)
            axis.set_ylabel(label)
            axis.set_xlabel("batch size")
    legend(figure, names, [IDEAL, OPEN], columns=5)
    return figure
