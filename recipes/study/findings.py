"""The findings in words. Every sentence is made from the numbers and the rules of ``thresholds.py``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from cells import Study
from names import Names
from records import CLOCKS
from scaling import Scaling
from sensitivity import Trend, dispersion, share_trend, shares_of_loss, shares_of_steps
from thresholds import LEAST_SEEDS, SCALABLE_EFFICIENCY, SENSITIVITY_STEPS_WITHIN, SENSITIVITY_WITHIN
from verdicts import Comparison, Finding, Outcome, at_best_batch_size, at_same_batch_size, cheapest, scales_no_better
from wording import amount, listed, percent, ranged, ratio

PUBLISHED = "kfac"  # the method of the published finding, which compares it with SGD
SGD = "sgd"


@dataclass
class Section:
    """A heading and its points."""

    title: str
    points: list[str] = field(default_factory=list)


def findings(study: Study, names: Names, scaling: Mapping[tuple[str, str], Scaling]) -> list[Section]:
    """All sections, from the short answer to the tasks; limits are a matter of ``limits.py``."""
    sections = [Section("In short", [*in_short(study, names), *published(study, names, scaling)])]
    for task in names.tasks:
        points = [
            *totals(study, task, names),
            *by_batch_size(study, task, names),
            *scaling_of_methods(task, names, scaling),
            *sensitivity_of_methods(study, task, names),
            *spread_of_seeds(study, task, names),
        ]
        sections.append(Section(names.tasks[task], points))
    trust = trust_region(study, names)
    return [*sections, Section("Trust-region methods", trust)] if trust else sections


def in_short(study: Study, names: Names) -> list[str]:
    """By measure: where the best second-order method needs less than the best first-order one."""
    points = []
    for measure in ("steps", "seconds", "propagations"):
        found = {task: best_of_each_order(study, task, names, measure) for task in names.tasks}
        whole = [c for each in found.values() for c in each]
        if not whole:
            continue
        less, more = (sum(c.outcome is outcome for c in whole) for outcome in (Outcome.LESS, Outcome.MORE))
        detail = "; ".join(f"{names.tasks[task]} {_outcomes(each, names)}" for task, each in found.items() if each)
        points.append(
            f"{measure.capitalize()} to the target: the best second-order method needs less than the best first-order "
            f"one at {less} of {len(whole)} pairs of task and batch size, and more at {more}. {detail}."
        )
    return points


def best_of_each_order(study: Study, task: str, names: Names, measure: str) -> list[Comparison]:
    """The best second-order with the best first-order method, at each batch size that has both."""
    found = []
    for size in study.batch_sizes(task):
        pair = [
            cheapest([c for c in study.at(task, size) if names.orders[c.method] == order], measure) for order in (2, 1)
        ]
        if pair[0] is not None and pair[1] is not None:
            found.append(Comparison(measure, pair[0], pair[1]))
    return found


def published(study: Study, names: Names, scaling: Mapping[tuple[str, str], Scaling]) -> list[str]:
    """Whether the published finding is seen, by task, and the same question of the other second-order methods."""
    points = []
    for method in sorted((m for m in names.methods if names.orders[m] == 2), key=lambda m: m != PUBLISHED):
        verdicts: dict[Finding, list[str]] = {}
        for task in names.tasks:
            ours, theirs = scaling.get((task, method)), scaling.get((task, SGD))
            finding, why = scales_no_better(ours, theirs)
            numbers = []
            if all(s is not None and s.decided and s.reach is not None for s in (ours, theirs)):
                numbers = [f"{_reach(ours)} against SGD's {_reach(theirs)}"]
            detail = "; ".join([*numbers, *([why] if why else [])])
            verdicts.setdefault(finding, []).append(f"{names.tasks[task]}: {detail}")
        words = [f"{finding.value} ({' | '.join(tasks)})" for finding, tasks in verdicts.items()]
        start = (
            f"Published finding, {names.methods[method]} scales no better than SGD beyond a critical batch size (which "
            "stands behind each task)"
            if method == PUBLISHED
            else f"The same of {names.methods[method]}"
        )
        points.append(f"{start}: {', '.join(words)}.")
    return points


def _reach(scaling: Scaling | None) -> str:
    """Up to which batch size steps fall well enough."""
    if scaling is None:
        return "not run"
    if not scaling.decided:
        return "too few batch sizes"
    if scaling.reach is None:
        return "no target at the smallest batch"
    if not scaling.reach.stops:
        return f"no end up to {scaling.largest}"
    seeds = sorted(reach.critical for reach in scaling.by_seed.values())
    ends = [amount(seed) if math.isfinite(seed) else f"no end up to {scaling.largest}" for seed in seeds]
    spread = f" (seeds {ends[0]} to {ends[-1]})" if len(seeds) > 1 and ends[0] != ends[-1] else ""
    return f"{amount(scaling.reach.critical)}{spread}"


def totals(study: Study, task: str, names: Names) -> list[str]:
    """The least of each order at any batch size, in each measure."""
    points = []
    for measure in CLOCKS:
        found = at_best_batch_size(study, task, names.orders, measure)
        if found is None:
            continue
        texts = []
        for cell in (found.ours, found.theirs):
            spread = cell.to_target(measure)
            label = names.methods[cell.method]
            texts.append(
                f"{label} {amount(spread.median)} at batch {cell.batch_size}" if spread.found else f"{label} never"
            )
        points.append(
            f"Fewest {measure} at any batch size: second order {texts[0]}, first order {texts[1]}: {_verdict(found)}."
        )
    return points


def _verdict(found: Comparison) -> str:
    if found.outcome is Outcome.LESS:
        text = f"second order needs {ratio(found.times)} times less" if found.times else "only second order arrives"
    elif found.outcome is Outcome.MORE:
        text = f"first order needs {ratio(1 / found.times)} times less" if found.times else "only first order arrives"
    elif found.outcome is Outcome.UNDECIDED:
        text = f"cannot be decided, fewer than {LEAST_SEEDS} seeds"
    else:
        text = found.outcome.value
    return text


def by_batch_size(study: Study, task: str, names: Names) -> list[str]:
    """Each second-order method with the best first-order one at the same batch size."""
    points = []
    for method in (m for m in names.methods if names.orders[m] == 2):
        texts: dict[str, list[str]] = {}
        for measure in CLOCKS:
            found = at_same_batch_size(study, task, method, names.orders, measure)
            if found:
                texts.setdefault(_outcomes(found), []).append(measure)
        if texts:
            text = ". ".join(f"{listed(measures).capitalize()}: {outcome}" for outcome, measures in texts.items())
            points.append(f"{names.methods[method]} against the best first-order method: {text}.")
    return points


def _outcomes(found: Sequence[Comparison], names: Names | None = None) -> str:
    """less at 64 and 128 (1.3 to 2.1 times), more at 256 (1.4 times); with names, who needs less."""
    words = []
    for outcome in Outcome:
        mine = [c for c in found if c.outcome is outcome]
        if not mine:
            continue
        sizes = "every batch size" if len(mine) == len(found) > 1 else listed([c.ours.batch_size for c in mine])
        extra = []
        if outcome in (Outcome.LESS, Outcome.MORE):
            less = outcome is Outcome.LESS
            if names is not None:
                winners = [names.short[(c.ours if less else c.theirs).method] for c in mine]
                extra.append(listed(list(dict.fromkeys(winners))))
            if times := [c.times if less else 1 / c.times for c in mine if c.times]:
                extra.append(f"{ranged(times)} times")
            if alone := [c.ours.batch_size for c in mine if not c.times]:
                extra.append(f"only {'it' if less else 'first order'} arrives at {listed(alone)}")
        elif outcome is Outcome.UNDECIDED:
            extra.append(f"fewer than {LEAST_SEEDS} seeds")
        words.append(f"{outcome.value} at {sizes}" + (f" ({'; '.join(extra)})" if extra else ""))
    return ", ".join(words)


def scaling_of_methods(task: str, names: Names, scaling: Mapping[tuple[str, str], Scaling]) -> list[str]:
    """The critical batch size of each method."""
    words = [f"{names.methods[m]} {_reach(scaling[task, m])}" for m in names.methods if (task, m) in scaling]
    return [f"Critical batch size, where efficiency falls below {SCALABLE_EFFICIENCY:g}: {'; '.join(words)}."]


def sensitivity_of_methods(study: Study, task: str, names: Names) -> list[str]:
    """Shares of good settings at the smallest and the largest batch size, and their trends."""
    points = []
    for shares_of, text in (
        (shares_of_loss, f"whose final loss is within {SENSITIVITY_WITHIN:g} of the best"),
        (shares_of_steps, f"that reaches the target in {SENSITIVITY_STEPS_WITHIN:g} times the fewest steps"),
    ):
        words = []
        for method in names.methods:
            shares = shares_of(study.of_method(task, method))
            known = {size: share for size, share in sorted(shares.items()) if share is not None}
            if not known:
                continue
            trend, _ = share_trend(shares)
            (low, first), (high, last) = min(known.items()), max(known.items())
            span = f"{percent(first)} at {low}" + (f", {percent(last)} at {high}" if high != low else "")
            verb = "too few batch sizes" if trend is Trend.UNKNOWN else trend.value
            words.append(f"{names.methods[method]} {span} ({verb})")
        if words:
            points.append(f"Share of the grid {text}: {'; '.join(words)}.")
    return points


def spread_of_seeds(study: Study, task: str, names: Names) -> list[str]:
    """The range over the seeds as a share of the median, steps to the target."""
    words = []
    for method in names.methods:
        spreads = [cell.to_target() for cell in study.of_method(task, method)]
        widths = [s.width / s.median for s in spreads if s.found and s.count > 1 and math.isfinite(s.width)]
        if widths:
            words.append(f"{names.methods[method]} {percent(median(widths))}")
    if not words:
        return []
    return [f"Range of steps over the seeds, as a share of the median (median of the batch sizes): {', '.join(words)}."]


def trust_region(study: Study, names: Names) -> list[str]:
    """Counts of the methods that report them, and how far final losses lie apart beside the other methods."""
    points = []
    for method in names.methods:
        records = [r for r in study.records if r.method == method and r.counts and r.steps]
        if not records:
            continue
        steps = sum(record.steps for record in records)
        total = {name: sum(r.counts.get(name, 0) for r in records) for name in records[0].counts}
        cg = f", {amount(total['cg_iterations'] / steps)} CG iterations a step" if "cg_iterations" in total else ""
        points.append(
            f"{names.methods[method]}, {len(records)} runs: negative curvature was met in "
            f"{percent(total.get('negative_curvature', 0) / steps)} of the steps, "
            f"{percent(total.get('rejected', 0) / steps)} were rejected{cg}."
        )
    if points:
        words = []
        for method in names.methods:
            mine = [dispersion(cell) for cell in study.cells.values() if cell.method == method]
            ratios = [d.ratio for d in mine if d.ratio is not None]
            if ratios:
                lost = sum(d.lost for d in mine) / sum(d.runs for d in mine)
                words.append(f"{names.methods[method]} {ratio(median(ratios))} ({percent(lost)} of the runs lost)")
        points.append(
            "Dispersion of final training losses over grid and seeds, third over first quartile (median of the cells), "
            f"and runs that diverged or failed: {', '.join(words)}."
        )
    return points
