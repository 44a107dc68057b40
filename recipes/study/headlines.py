"""What a panel shows, in one short line made from its numbers."""

from __future__ import annotations

from collections.abc import Callable

from cells import Cell, Study
from names import Names
from sensitivity import Trend, share_trend
from verdicts import Comparison, Outcome, at_best_batch_size, cheapest
from wording import amount, ratio


def headline_of_steps(study: Study, task: str, names: Names, measure: str = "steps") -> str:
    """The best of each order at the largest batch size."""
    size = study.batch_sizes(task)[-1]
    cells = study.at(task, size)
    ours = cheapest([cell for cell in cells if names.orders[cell.method] == 2], measure)
    theirs = cheapest([cell for cell in cells if names.orders[cell.method] == 1], measure)
    if ours is None or theirs is None:
        return f"At {size}: only one order was run"
    found = Comparison(measure, ours, theirs)
    if found.outcome is Outcome.NEITHER:
        return f"At {size}: no method reaches it"
    return f"At {size}: {_who(found, names, 'fewer')}"


def headline_of_total(study: Study, task: str, names: Names, measure: str) -> str:
    """The least of each order at any batch size."""
    found = at_best_batch_size(study, task, names.orders, measure)
    if found is None:
        return "Only one order was run"
    if found.outcome is Outcome.NEITHER:
        return "No method reaches the target"
    return f"Least: {_who(found, names, 'less')}"


def _who(found: Comparison, names: Names, less: str) -> str:
    ours, theirs = (names.short[cell.method] for cell in (found.ours, found.theirs))
    times = found.times
    if found.outcome is Outcome.LESS:
        return f"{ours}, {ratio(times)}x {less} than {theirs}" if times else f"{ours}; no first order arrives"
    if found.outcome is Outcome.MORE:
        return f"{theirs}, {ratio(1 / times)}x {less} than {ours}" if times else f"{theirs}; no second order arrives"
    if found.outcome is Outcome.SAME:
        return f"{ours} and {theirs} within the spread"
    values = [cell.to_target(found.measure) for cell in (found.ours, found.theirs)]
    texts = [f"{name} {amount(v.median)}" for name, v in zip((ours, theirs), values, strict=True) if v.found]
    return f"{', '.join(texts)} (too few seeds)"


def headline_of_sensitivity(
    study: Study, task: str, names: Names, shares: Callable[[list[Cell]], dict[int, float | None]]
) -> str:
    """For how many methods the share of good settings shrinks as the batch grows. Args: shares: of a method's cells."""
    found = [study.of_method(task, method) for method in names.methods]
    trends = [share_trend(shares(cells))[0] for cells in found if cells]
    known = [trend for trend in trends if trend is not Trend.UNKNOWN]
    if not known:
        return "too few batch sizes for a trend"
    shrinks, grows = known.count(Trend.SHRINKS), known.count(Trend.GROWS)
    if not shrinks and not grows:
        return f"no clear trend in {len(known)} methods"
    return f"shrinks for {shrinks}, grows for {grows} of {len(known)} methods"
