"""Figures of the spread over seeds, and of what trust-region methods count."""

from __future__ import annotations

import math

import numpy as np
from cells import Cell, Study, to_target
from curves import plot_gaps, rows
from matplotlib.figure import Figure
from names import Names
from sensitivity import dispersion
from style import batch_axis, legend, line_style, number_axis

COUNTS = {
    "negative_curvature": "negative curvature, share of steps",
    "rejected": "rejected, share of steps",
    "cg_iterations": "CG iterations a step",
}


def spread_figure(study: Study, names: Names) -> Figure:
    """A row for each task: every seed's steps to the target and final training loss, methods side by side."""
    figure = Figure(figsize=(9, 0.6 + 2.9 * len(names.tasks)), layout="constrained")
    for part, task in zip(rows(figure, len(names.tasks)), names.tasks, strict=True):
        part.suptitle(names.tasks[task], x=0.01, ha="left", fontweight="bold", fontsize=10)
        axes = part.subplots(1, 2)
        shifts = np.linspace(-0.32, 0.32, len(names.methods))
        for method, shift in zip(names.methods, shifts, strict=True):
            style = {**line_style(method, names), "markersize": 4}
            for cell in study.of_method(task, method):
                place = cell.batch_size * 2**shift
                for axis, values in zip(axes, (_steps(cell), _finals(cell)), strict=True):
                    axis.plot([place] * len(values), values, **{**style, "linestyle": "-", "linewidth": 1})
        for axis, label in zip(axes, ("steps to the target", "final training loss"), strict=True):
            axis.set_ylabel(label)
            axis.set_xlabel("batch size (methods side by side)")
            batch_axis(axis, study.batch_sizes(task))
            axis.set_xlim(study.batch_sizes(task)[0] / 1.6, study.batch_sizes(task)[-1] * 1.6)
            number_axis(axis)
    legend(figure, names)
    return figure


def _steps(cell: Cell) -> list[float]:
    return [value for run in cell.runs if math.isfinite(value := to_target(run))]


def _finals(cell: Cell) -> list[float]:
    return [value for value in cell.final_losses() if math.isfinite(value)]


def trust_region_figure(study: Study, names: Names) -> Figure | None:
    """A row for each task: what the methods that count count, and the dispersion of final losses of all methods.

    None where no method has counts.
    """
    counting = [m for m in names.methods if any(r.counts for r in study.records if r.method == m)]
    if not counting:
        return None
    figure = Figure(figsize=(9, 0.6 + 2.7 * len(names.tasks)), layout="constrained")
    for part, task in zip(rows(figure, len(names.tasks)), names.tasks, strict=True):
        part.suptitle(names.tasks[task], x=0.01, ha="left", fontweight="bold", fontsize=10)
        axes, sizes = part.subplots(1, 4), study.batch_sizes(task)
        for method in names.methods:
            cells, style = study.of_method(task, method), line_style(method, names)
            for axis, name in zip(axes, COUNTS, strict=False):
                if method in counting:
                    plot_gaps(axis, {cell.batch_size: per_step(cell, name) for cell in cells}, sizes, style)
            plot_gaps(axes[3], {cell.batch_size: dispersion(cell).ratio for cell in cells}, sizes, style)
        for axis, label in zip(axes, (*COUNTS.values(), "final losses, quartile 3 / 1"), strict=True):
            axis.set_title(label, fontsize=7.5)
            axis.set_xlabel("batch size")
            batch_axis(axis, sizes)
            if axis is not axes[3]:
                axis.set_ylim(0, 1.1 * max(axis.get_ylim()[1], 1e-3))
        number_axis(axes[3])
    legend(figure, names)
    return figure


def per_step(cell: Cell, name: str) -> float | None:
    """A count over the steps, all runs of the cell; None where no run counts it."""
    records = {r.id: r for r in (*cell.grid, *cell.runs) if name in r.counts and r.steps}.values()
    return sum(r.counts[name] for r in records) / sum(r.steps for r in records) if records else None
