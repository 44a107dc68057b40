"""How figures look: a palette that colour-blind readers can tell apart, and SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from names import Names

INK, PAPER = "#1b1c1e", "#fdfefe"  # replaced in SVG by the page's own colours
# Okabe and Ito's palette; SGD has the colour of the text
COLOURS = {
    "sgd": INK,
    "adamw": "#e69f00",
    "kfac": "#0072b2",
    "shampoo": "#d55e00",
    "sonew": "#009e73",
    "trcg": "#cc79a7",
    "strcg": "#56b4e9",
}
OTHERS = ("#8c6d31", "#7b4fa3", "#a6761d", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
SIZE = {"font": 9.0, "small": 8.0}


def line_style(method: str, names: Names) -> dict[str, Any]:
    """Colour, marker and line of a method: first order dashed, second order solid."""
    order = list(names.methods)
    others = [name for name in order if name not in COLOURS]
    colour = COLOURS.get(method) or OTHERS[others.index(method) % len(OTHERS)]
    known = list(COLOURS)
    place = known.index(method) if method in COLOURS else len(known) + others.index(method)
    return {
        "color": colour,
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "--" if names.orders[method] == 1 else "-",
        "linewidth": 1.5,
        "markersize": 5,
    }


@contextmanager
def theme() -> Iterator[None]:
    """Fonts and colours of all figures."""
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[str, Any] = {
        **{name: INK for name in ink},
        "font.size": SIZE["font"],
        "axes.titlesize": SIZE["font"],
        "axes.titlelocation": "left",
        "axes.labelsize": SIZE["font"],
        "xtick.labelsize": SIZE["small"],
        "ytick.labelsize": SIZE["small"],
        "legend.fontsize": SIZE["small"],
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "hatch.color": "#555555",
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(settings):
        yield


def batch_axis(axis: Axes, sizes: list[int]) -> None:
    """A logarithmic axis of batch sizes, at most five of them written."""
    axis.set_xscale("log", base=2)
    every = -(-len(sizes) // 5)
    axis.set_xticks(sizes[::every], [size_label(size) for size in sizes[::every]])
    axis.set_xticks(sizes, minor=True)
    axis.tick_params(axis="x", which="minor", labelbottom=False)
    axis.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axis.grid(color=INK, alpha=0.15, linewidth=0.6)


def size_label(size: int) -> str:
    return f"{size // 1024}k" if size >= 8192 and size % 1024 == 0 else str(size)


def number_label(value: float, _: object = None) -> str:
    """For logarithmic axes: 20, 3k, 4M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def number_axis(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers, at 1, 2 and 5 where the range is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(10, steps))
    axis.yaxis.set_major_formatter(FuncFormatter(number_label))
    axis.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, names: Names, extra: list[Line2D] | None = None, columns: int = 8) -> None:
    """All methods and what their lines mean, below the panels."""
    lines = [Line2D([], [], label=label, **line_style(name, names)) for name, label in names.methods.items()]
    lines += extra or []
    rows = -(-len(lines) // columns)
    figure.legend(handles=lines, loc="outside lower center", ncols=-(-len(lines) // rows))


def save_png(figure: Figure, path: Path, dpi: int = 150) -> None:
    figure.savefig(path, dpi=dpi, facecolor="white", metadata={"Software": None})


def _shortened(path: re.Match[str]) -> str:
    """The same path with one decimal: a tenth of a point."""
    return re.sub(r"\s+", " ", re.sub(r"(\d+\.\d)\d+", r"\1", path[0]))


def to_svg(figure: Figure, name: str) -> str:
    """SVG for a page: text stays text, the ink is ``currentColor`` and the paper ``var(--paper)``.

    Args:
        name: makes the identifiers in the SVG differ from those of other figures on the page.
    """
    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    used = {found for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text) for found in pair}
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r">\s+<", "><", re.sub(r' d="[^"]*"', _shortened, text))
    return text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
