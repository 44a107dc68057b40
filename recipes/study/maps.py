"""Figures of planes: the grid of settings of each method and batch size, and loss landscapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from cells import Study, to_target
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from names import Names
from sensitivity import Grid, grid_of
from style import INK, PAPER, size_label

WORST = 4.0  # times the fewest steps; what is worse has the last colour
COLOURS = "viridis_r"
LOST, FAR = "#c9c9c9", "#e4e4e4"


def heat_figure(study: Study, task: str, names: Names) -> Figure:
    """A map for each method and batch size: steps to the target over the fewest of that map."""
    methods = [name for name in names.methods if study.of_method(task, name)]
    sizes = study.batch_sizes(task)
    figure = Figure(figsize=(2.6 + 1.25 * len(sizes), 1.1 + 0.95 * len(methods)), layout="constrained")
    axes = figure.subplots(len(methods), len(sizes), squeeze=False)
    norm = LogNorm(1.0, WORST)
    mesh = None
    for row, method in zip(axes, methods, strict=True):
        cells = study.of_method(task, method)
        for axis, size in zip(row, sizes, strict=True):
            cell = study.cells.get((task, method, size))
            grid = grid_of(cells[0] if cell is None else cell, cells)
            if cell is not None:
                mesh = _heat(axis, grid, norm) or mesh
            _grid_ticks(axis, grid, axis is row[0], cell is None)
            if axis in axes[0]:
                axis.set_title(f"B = {size_label(size)}", loc="center")
        label = f"{names.methods[method]}\nup: {grid.names[0]}\nright: {grid.names[1]}"
        row[0].set_ylabel(label, rotation=0, ha="left", va="center", labelpad=95, fontsize=8)
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=axes, location="bottom", aspect=60, shrink=0.6, extend="max", pad=0.02)
        bar.set_label("steps to the target over the fewest of the grid")
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.xaxis.set_minor_locator(NullLocator())
        bar.set_ticks([1, 1.25, 1.5, 2, 3, 4])
    keys = [
        Patch(facecolor=FAR, label="target not reached"),
        Patch(facecolor=LOST, hatch="xxx", label="diverged or failed"),
        Patch(facecolor="none", edgecolor="#d55e00", linewidth=2, label="tuned point"),
        Patch(facecolor="none", edgecolor=INK, linewidth=0.5, label="empty: not run"),
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4)
    return figure


def _heat(axis: Axes, grid: Grid, norm: Normalize) -> Any:
    steps = {place: to_target(record) for place, record in grid.records.items()}
    best = min(steps.values(), default=math.inf)
    values = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for (row, column), record in grid.records.items():
        if math.isfinite(steps[row, column]):
            values[row, column] = steps[row, column] / best
        else:
            lost = record.diverged or record.error is not None
            look = {"facecolor": LOST, "hatch": "xxx"} if lost else {"facecolor": FAR}
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, edgecolor="none", **look))
    edges = [np.arange(len(each) + 1) - 0.5 for each in (grid.columns, grid.rows)]
    mesh = axis.pcolormesh(*edges, np.ma.masked_invalid(values), cmap=COLOURS, norm=norm, linewidth=0)
    if grid.tuned is not None:
        row, column = grid.tuned
        box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d55e00", linewidth=2, clip_on=False)
        axis.add_patch(box)
    return mesh


def _grid_ticks(axis: Axes, grid: Grid, first: bool, empty: bool) -> None:
    axis.set_xlim(-0.5, len(grid.columns) - 0.5)
    axis.set_ylim(-0.5, len(grid.rows) - 0.5)
    axis.set_xticks(range(len(grid.columns)), [] if empty else [f"{v:g}" for v in grid.columns], fontsize=6)
    axis.set_yticks(range(len(grid.rows)), [f"{v:g}" for v in grid.rows] if first else [], fontsize=6)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(empty)
        spine.set_linewidth(0.5)


def landscape_figure(planes: list[dict[str, Any]], task: str, names: Names) -> Figure | None:
    """Contours of the loss around the tuned solutions, a row for each batch size; None without a plane of the task.

    Args:
        planes: as ``landscapes.json`` has them.
    """
    mine = {(plane["batch_size"], plane["method"]): plane for plane in planes if plane["task"] == task}
    sizes = sorted({size for size, _ in mine})
    methods = [name for name in names.methods if any((size, name) in mine for size in sizes)]
    if not mine or not methods:
        return None
    losses = np.concatenate([_loss(plane).ravel() for plane in mine.values()])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    low, high = (float(each) for each in np.quantile(losses, (0.03, 0.9)))  # a deep solution would take all colours
    levels = np.geomspace(low, max(high, 1.01 * low), 13)
    figure = Figure(figsize=(0.9 + 1.55 * len(methods), 0.9 + 1.7 * len(sizes)), layout="constrained")
    axes = figure.subplots(len(sizes), len(methods), squeeze=False, sharex=True, sharey=True)
    filled = None
    for row, size in zip(axes, sizes, strict=True):
        for axis, method in zip(row, methods, strict=True):
            plane = mine.get((size, method))
            axis.set_aspect("equal")
            axis.tick_params(labelsize=7)
            axis.locator_params(nbins=4)
            if axis in axes[0]:
                axis.set_title(names.short[method], loc="center")
            if plane is None:
                axis.text(0.5, 0.5, "missing", transform=axis.transAxes, ha="center", va="center", fontsize=7)
                continue
            loss = np.clip(np.nan_to_num(_loss(plane), nan=levels[-1], posinf=levels[-1]), levels[0], levels[-1])
            extent = plane["alphas"], plane["betas"], loss.T
            filled = axis.contourf(*extent, levels=levels, cmap="viridis", norm=LogNorm(levels[0], levels[-1]))
            axis.contour(*extent, levels=levels, colors=PAPER, linewidths=0.4, alpha=0.7)
            axis.plot(0, 0, marker="+", color="#d55e00", markersize=7, markeredgewidth=1.5)
        row[0].set_ylabel(f"batch {size}")
    if filled is not None:
        bar = figure.colorbar(filled, ax=axes, location="bottom", aspect=60, shrink=0.6, pad=0.03)
        bar.set_label(f"{names.losses[task]}, on a part of the training set")
        bar.ax.xaxis.set_minor_formatter(NullFormatter())
        ticks = levels[::3]
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    return figure


def _loss(plane: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Rows go with alphas; what is not finite stands as null in the file."""
    return np.array([[math.nan if value is None else value for value in row] for row in plane["loss"]], float)
