"""What the rows of the study say: page.html, pictures and findings.md beside them. Works on part of the rows too.

python recipes/study/report.py --results recipes/study/results/small
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import Study
from findings import Section, findings
from limits import limits
from names import Names
from page import Part, Picture, page
from plan import load_extras
from records import read
from scaling import scalings
from tables import Table, success_table, tuned_table
from thresholds import RULES, SENSITIVITY_STEPS_WITHIN, SENSITIVITY_WITHIN
from verdicts import table

TITLE = "First- and second-order optimizers over batch sizes"
INTRODUCTION = (
    "Steps, samples, seconds and propagations to a training loss that was set beforehand, for each method at its tuned "
    "point of a grid of equal size, over batch sizes. First order is dashed, second order solid. Every sentence and "
    "table is made from the rows by rules that were written down before the results."
)


class Report:
    """The report on one folder of results.

    Args:
        results: the folder with ``runs.jsonl`` and, if there are any, ``landscapes.json``.

    Raises:
        SystemExit: there are no rows of a grid.
        ValueError: a row's task or method is not registered any more.
    """

    def __init__(self, results: Path) -> None:
        self.results = results
        self.study = Study.of(read(results / "runs.jsonl"))
        if not self.study.cells:
            raise SystemExit(f"{results / 'runs.jsonl'} has no run of a grid yet: python recipes/study/run.py")
        self.names = Names.of(self.study)
        self.scaling = scalings(self.study)
        planes = results / "landscapes.json"
        self.planes: list[dict[str, Any]] = json.loads(planes.read_text()) if planes.exists() else []

    def sections(self) -> list[Section]:
        return findings(self.study, self.names, self.scaling)

    def success_table(self) -> Table:
        names, tasks = self.names, list(self.names.tasks)
        return success_table(table(self.study, names.orders, self.scaling, list(names.methods), tasks), names)

    def markdown(self) -> str:
        """findings.md: what a README can quote."""
        rules = Section("Rules, written down beforehand", [f"{name}: {rule}." for name, rule in RULES.items()])
        bounds = Section("Limits", limits(self.study, self.names))
        first, *others = self.sections()
        lines = ["# Findings", "", "Written by report.py from runs.jsonl.", "", "![the study](study.png)", ""]
        lines += [*_points(first), "## Table", "", self.success_table().markdown(), ""]
        for section in (*others, rules, bounds):
            lines += _points(section)
        return "\n".join(lines).rstrip() + "\n"

    def write(self) -> list[Path]:
        """Every picture, the page and findings.md. Returns: what was written."""
        pictures = self._pictures()
        first, *others = self.sections()
        general = [name for name in ("speed_up", "sensitivity", "spread") if name in pictures]
        parts = [
            Part("In short", first.points, pictures=[pictures["study"]]),
            Part("Table", tables=[self.success_table()]),
        ]
        tasks = {label: name for name, label in self.names.tasks.items()}
        for section in others:
            task = tasks.get(section.title)
            if task is None:
                parts.append(Part(section.title, section.points, pictures=[pictures["trust_region"]]))
                continue
            own = [pictures[key] for kind in ("cost", "grid", "landscape") if (key := f"{kind}_{task}") in pictures]
            tuned = ("Every tuned point", tuned_table(self.study, task, self.names))
            parts.append(Part(section.title, section.points, pictures=own, folded=[tuned]))
        parts.append(Part("Speed-up, sensitivity, seeds", pictures=[pictures[name] for name in general]))
        parts.append(Part("Rules", [f"{name}: {rule}." for name, rule in RULES.items()]))
        parts.append(Part("Limits", limits(self.study, self.names)))
        (self.results / "page.html").write_text(page(TITLE, INTRODUCTION, parts), encoding="utf-8")
        (self.results / "findings.md").write_text(self.markdown(), encoding="utf-8")
        return [self.results / name for name in ("page.html", "findings.md", *(f"{name}.png" for name in pictures))]

    def _pictures(self) -> dict[str, Picture]:
        """Each drawn once, written as PNG and kept as SVG."""
        from curves import cost_figure, main_figure, sensitivity_figure, speed_up_figure
        from maps import heat_figure, landscape_figure
        from seeds import spread_figure, trust_region_figure
        from style import save_png, theme, to_svg

        study, names, found = self.study, self.names, dict[str, Picture]()

        def add(name: str, caption: str, draw: Callable[..., Any], *arguments: object, dpi: int = 120) -> None:
            with theme():
                if (figure := draw(*arguments)) is not None:
                    save_png(figure, self.results / f"{name}.png", dpi)
                    found[name] = Picture(to_svg(figure, name), caption)

        ranges = "lines are medians over seeds, thick bars their range, open markers budgets spent without reaching it"
        near = f"Share of the grid with a final loss within {SENSITIVITY_WITHIN:g} of the best"
        add(
            "study",
            f"Steps and processor seconds to the target, and the share of the grid that reaches it in "
            f"{SENSITIVITY_STEPS_WITHIN:g} times the fewest steps; {ranges}.",
            *(main_figure, study, names),
            dpi=200,
        )
        for task, label in names.tasks.items():
            add(f"cost_{task}", f"{label}: what the target costs; {ranges}.", cost_figure, study, task, names)
            text = f"{label}: the grid of every method and batch size, steps to the target over the fewest."
            add(f"grid_{task}", text, heat_figure, study, task, names)
            text = f"{label}: loss on a filter-normalised random plane around tuned solutions (crosses). "
            text += "One colour scale; its first and last stand for all losses beyond."
            add(f"landscape_{task}", text, landscape_figure, self.planes, task, names)
        text = "Speed-up over the method's own smallest batch, and over the best first-order method at the same batch."
        add("speed_up", text, speed_up_figure, study, names)
        text = f"{near}; that reaches the target in {SENSITIVITY_STEPS_WITHIN:g} times the fewest steps; at all."
        add("sensitivity", text, sensitivity_figure, study, names)
        add("spread", "Every seed of the tuned points: steps to the target, final loss.", spread_figure, study, names)
        text = "Trust-region methods: negative curvature, rejected steps, CG iterations; dispersion of final losses."
        add("trust_region", text, trust_region_figure, study, names)
        return found


def _points(section: Section) -> list[str]:
    return [f"## {section.title}", "", *(f"- {point}" for point in section.points), ""]


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    here = Path(__file__).parent / "results" / "small"
    parser.add_argument("--extra", type=Path, nargs="+", default=[], help="as run.py's: files that register more")
    parser.add_argument("--results", type=Path, default=here, help=f"folder with runs.jsonl (default: {here})")
    given = parser.parse_args()
    load_extras(given.extra)
    for path in Report(given.results).write():
        print(path)


if __name__ == "__main__":
    main()
