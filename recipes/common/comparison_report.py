"""The tables and the picture of a Comparison: steps and seconds to the first contender's final loss."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

from comparison import Comparison, Contender, Row, Run, final
from matplotlib.figure import Figure

Runs = dict[Run, list[Row]]


def report(comparison: Comparison) -> None:
    """Write comparison/README.md and comparison/comparison.png."""
    runs, timing = comparison.read(), comparison.read_timing()
    best = {contender.name: comparison.tuned(contender, runs) for contender in comparison.contenders}
    target = final(runs[best[comparison.contenders[0].name]])
    lines = [
        f"# {comparison.title}",
        "",
        comparison.introduction.strip(),
        "",
        "![validation loss against steps and seconds](comparison.png)",
        "",
        *_table(comparison, runs, timing, best, target),
        *_budgets(comparison, runs, timing, best),
        *_grids(comparison, runs),
    ]
    _picture(comparison, runs, timing, best, target)
    (comparison.results / "README.md").write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


def soonest(comparison: Comparison, runs: Runs, tuned: Run, target: float) -> Run | None:
    """The smallest budget whose run ends at or below the target: its schedule is fitted to that budget."""
    budgets = sorted({*comparison.budgets, comparison.steps})
    ordered = [replace(tuned, steps=steps) for steps in budgets]
    return next((run for run in ordered if run in runs and final(runs[run]) <= target), None)


def _table(
    comparison: Comparison, runs: Runs, timing: dict[str, float], best: dict[str, Run], target: float
) -> list[str]:
    first = comparison.contenders[0].name
    lines = [
        f"The target is {first}'s {comparison.unit} after {comparison.steps} steps at its best learning rate, seed 0: "
        f"{target:.4f}. Steps to it: the smallest budget, of those below, whose run ends there or lower. Seconds: "
        "steps times milliseconds, one thread, roots counted in.",
        "",
        f"| | lr | {comparison.unit} after {comparison.steps} steps | seeds | ms/step | steps to {target:.4f} | "
        "seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for contender in comparison.contenders:
        run, each = best[contender.name], timing[contender.name]
        losses = [final(runs[r]) for s in range(comparison.seeds) if (r := replace(run, seed=s)) in runs]
        found = soonest(comparison, runs, run, target)
        reached = f"{found.steps} | {found.steps * each / 1e3:.1f}" if found else "- | -"
        spread = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {contender.name} | {run.lr:g} | {mean(losses):.4f} | {spread} | {each:.0f} | {reached} |")
    return [*lines, ""]


def _budgets(comparison: Comparison, runs: Runs, timing: dict[str, float], best: dict[str, Run]) -> list[str]:
    budgets = sorted({*comparison.budgets, comparison.steps})
    lines = [
        "## Every budget",
        "",
        f"{_sentence(comparison.unit)} at the end of a schedule fitted to the budget, and its seconds; seed 0.",
        "",
        "| steps | " + " | ".join(contender.name for contender in comparison.contenders) + " |",
        "|---" * (len(comparison.contenders) + 1) + "|",
    ]
    for steps in budgets:
        row = []
        for contender in comparison.contenders:
            run = replace(best[contender.name], steps=steps)
            seconds = steps * timing[contender.name] / 1e3
            row.append(f"{final(runs[run]):.4f} ({seconds:.0f} s)" if run in runs else "-")
        lines.append(f"| {steps} | " + " | ".join(row) + " |")
    return [*lines, ""]


def _grids(comparison: Comparison, runs: Runs) -> list[str]:
    lines = [
        "## Every learning rate tried",
        "",
        f"{_sentence(comparison.unit)} after {comparison.steps} steps, seed 0. Grids of equal size, extended while "
        "the best value is at an edge.",
        "",
    ]
    for contender in comparison.contenders:
        tried = [r for r in runs if (r.contender, r.steps, r.seed) == (contender.name, comparison.steps, 0)]
        losses = ", ".join(f"{r.lr:g}: {final(runs[r]):.4f}" for r in sorted(tried, key=lambda r: r.lr))
        lines.append(f"- {contender.name}: {losses}")
    return [*lines, ""]


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _picture(comparison: Comparison, runs: Runs, timing: dict[str, float], best: dict[str, Run], target: float) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    lowest, highest = target, target

    def draw(contender: Contender, run: Run, **style: object) -> None:
        nonlocal lowest, highest
        rows = runs[run]
        losses = [row.validation_loss for row in rows]
        for axis, each in zip(axes, (1.0, timing[contender.name] / 1e3), strict=True):
            axis.plot([row.step * each for row in rows], losses, **style)
        lowest, highest = min(lowest, *losses), max(highest, *losses[len(losses) // 10 :])

    for index, contender in enumerate(comparison.contenders):
        run, color = best[contender.name], f"C{index}"
        draw(contender, run, color=color, label=f"{contender.name}, lr {run.lr:g}")
        for steps in comparison.budgets:
            if (shorter := replace(run, steps=steps)) in runs:
                draw(contender, shorter, color=color, alpha=0.35, linewidth=1)
    for axis, label in zip(axes, ("steps", "seconds, one thread"), strict=True):
        axis.axhline(target, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel(label)
        axis.set_ylim(lowest - 0.05 * (highest - lowest), highest)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"validation {comparison.unit}")
    axes[0].legend()
    figure.savefig(comparison.results / "comparison.png", dpi=110)
