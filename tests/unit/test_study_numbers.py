"""The numbers of the study's report against the laws that made the rows, and both outcomes of the published finding."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from study_rows import (
    ORDERS,
    SIZES,
    cells,
    falling,
    never,
    row,
    rows_of,
    scaling,
    sensitivity,
    study_of,
    verdicts,
    words,
)


def two(kfac_floor: float, sgd_floor: float, samples: float = 20000, **others: Any) -> Any:
    """SGD and K-FAC, ideal down to a floor: the efficiency is one half at twice samples / floor."""
    rows = rows_of("mlp", "sgd", falling(samples, sgd_floor), **others)
    return study_of(rows + rows_of("mlp", "kfac", falling(samples, kfac_floor), **others))


def test_tuned_points_and_spreads_are_those_of_the_law() -> None:
    study = study_of(rows_of("mlp", "sgd", falling(20000, 40), wobble=0.1))
    for size in SIZES:
        cell = study.cells["mlp", "sgd", size]
        steps = max(20000 / size, 40)
        assert cell.tuned == {"lr": 1.0, "momentum": 1.0}
        assert [run.seed for run in cell.runs] == [0, 1, 2] and len(cell.grid) == 9
        spread = cell.to_target()
        assert (spread.low, spread.median, spread.high) == pytest.approx((0.9 * steps, steps, 1.1 * steps))
        assert cell.to_target("samples").median == pytest.approx(steps * size)
        assert cell.to_target("propagations").median == pytest.approx(2 * steps * size)
        assert cell.to_target("seconds").median == pytest.approx(0.01 * steps)


def test_a_point_that_no_seed_reaches_is_tuned_by_its_loss_and_one_that_two_of_three_reach_counts() -> None:
    missed = rows_of("mlp", "sgd", never, sizes=[64])
    missed[3]["final"] = {"train_loss": 0.1}  # lr 1, momentum 0.1
    missed += [row("mlp", "sgd", 64, (1.0, 0.1), seed, "seeds", None) for seed in (1, 2)]
    cell = study_of(missed).cells["mlp", "sgd", 64]
    assert cell.tuned == {"lr": 1.0, "momentum": 0.1}
    assert not cell.to_target().found and cell.to_target().median == math.inf
    assert cell.spent() == 10 * 4096 / 64  # the budget: more steps than these are needed

    two_of_three = rows_of("mlp", "sgd", falling(6400), sizes=[64])
    two_of_three[-1]["reached"] = None
    spread = study_of(two_of_three).cells["mlp", "sgd", 64].to_target()
    assert spread.found and spread.reached == 2 and spread.width == math.inf and spread.median == pytest.approx(102)
    three_of_five = cells.Spread.of([100, 101, 102, math.inf, math.inf])
    assert three_of_five.median == 102 and not three_of_five.found  # less than two thirds


def test_every_point_diverged_leaves_a_cell_without_a_tuned_point() -> None:
    rows = [row("mlp", "sgd", 64, (v, v), 0, "grid", None, diverged=True) for v in (0.1, 1.0)]
    cell = study_of(rows).cells["mlp", "sgd", 64]
    assert cell.tuned is None and not cell.to_target().found
    assert sensitivity.share_of_loss(cell) is None and sensitivity.share_of_steps(cell, 2) is None
    assert sensitivity.dispersion(cell) == sensitivity.Dispersion(None, 2, 2)


@pytest.mark.parametrize(
    ("samples", "floor", "holds", "critical"),
    [
        (20000, 25, 1024, 1600),  # floor from batch 800 on, samples are twice the least at 1600
        (20000, 0, 4096, math.inf),
        (6400, 25, 256, 512),  # floor from 256 on
        (6400, 100, 64, 128),  # none at all
    ],
)
def test_critical_batch_size_of_a_law(samples: float, floor: float, holds: int, critical: float) -> None:
    study = study_of(rows_of("mlp", "sgd", falling(samples, floor), wobble=0.0))
    found = scaling.scalings(study)["mlp", "sgd"]
    assert found.decided and found.reach.holds == holds
    assert found.reach.critical == pytest.approx(critical)
    assert list(found.by_seed) == [0, 1, 2]
    assert [reach.critical for reach in found.by_seed.values()] == pytest.approx([critical] * 3)


def test_critical_batch_size_of_a_hyperbola_is_that_of_the_law() -> None:
    """McCandlish's: steps = least (1 + critical / B), over small steps in B and from small B0."""
    points = [scaling.Point(2**power, 50 * (1 + 2000 / 2**power)) for power in range(1, 16)]
    assert scaling.reach_of(points, 2).critical == pytest.approx(2000, rel=0.02)


def test_a_budget_spent_in_vain_ends_scaling_and_no_target_at_the_smallest_batch_decides_nothing() -> None:
    law = falling(20000)
    study = study_of(rows_of("mlp", "sgd", lambda size: law(size) if size < 4096 else None, wobble=0.0))
    reach = scaling.scalings(study)["mlp", "sgd"].reach
    assert reach.holds == 1024 and 1024 < reach.critical < 4096
    # as many samples as the budget at B0 allows: the bound on the efficiency at 2 B0 is one half, and does not hold
    assert scaling.reach_of([scaling.Point(64, 640), scaling.Point(128, 640, False)], 64).holds == 64
    late = study_of(rows_of("mlp", "sgd", lambda size: None if size == 64 else law(size)))
    assert scaling.scalings(late)["mlp", "sgd"].reach is None
    assert verdicts.scalable_on(scaling.scalings(late)["mlp", "sgd"]) is verdicts.Scalable.NO


def test_speed_ups_are_those_of_the_laws() -> None:
    study = study_of(
        rows_of("mlp", "sgd", falling(20000, 40))
        + rows_of("mlp", "adamw", falling(16000, 40))
        + rows_of("mlp", "kfac", falling(8000, 2), seconds_per_step=0.05)
    )
    own = scaling.own_speed_up(study.of_method("mlp", "sgd"), 64)
    assert own == pytest.approx({64: 1, 256: 4, 1024: 20000 / 64 / 40, 4096: 20000 / 64 / 40})
    by_steps = verdicts.at_same_batch_size(study, "mlp", "kfac", ORDERS, "steps")
    assert [c.theirs.method for c in by_steps[:2]] == ["adamw", "adamw"]
    assert [c.times for c in by_steps] == pytest.approx([2, 2, 40 / (8000 / 1024), 40 / 2])
    assert {c.outcome for c in by_steps} == {verdicts.Outcome.LESS}
    by_seconds = verdicts.at_same_batch_size(study, "mlp", "kfac", ORDERS, "seconds")
    assert [c.times for c in by_seconds] == pytest.approx([2 / 5, 2 / 5, 40 / (8000 / 1024) / 5, 40 / 2 / 5])
    outcomes = [c.outcome.value for c in by_seconds]
    assert outcomes == ["more", "more", "no difference beyond the spread", "less"]
    total = verdicts.at_best_batch_size(study, "mlp", ORDERS, "samples")
    assert (total.ours.method, total.theirs.method, total.times) == ("kfac", "adamw", pytest.approx(2))


def test_a_difference_counts_only_beyond_the_spread_of_the_seeds() -> None:
    spread, outcome = cells.Spread.of, verdicts.Outcome
    assert verdicts.compare(spread([90, 100, 110]), spread([115, 121, 125])) is outcome.LESS
    assert verdicts.compare(spread([90, 100, 110]), spread([115, 119, 125])) is outcome.SAME
    assert verdicts.compare(spread([121, 121, 121]), spread([90, 100, 110])) is outcome.MORE
    assert verdicts.compare(spread([1, 1, 1]), spread([math.inf] * 3)) is outcome.LESS
    assert verdicts.compare(spread([1, 1, math.inf]), spread([2, math.inf, math.inf])) is outcome.SAME
    assert verdicts.compare(spread([math.inf] * 3), spread([1, 1, math.inf])) is outcome.MORE
    assert verdicts.compare(spread([math.inf] * 3), spread([math.inf] * 3)) is outcome.NEITHER
    assert verdicts.compare(spread([1, 1]), spread([9, 9, 9])) is outcome.UNDECIDED
    assert verdicts.compare(spread([math.inf]), spread([math.inf])) is outcome.NEITHER
    assert verdicts.compare(spread([]), spread([9, 9, 9])) is outcome.MORE  # every point of the grid diverged


LOST = row("mlp", "sgd", 64, (0.1, 0.1), 0, "grid", None, diverged=True)


def test_sensitivity_is_the_share_of_the_grid() -> None:
    """One best point, four at 1.6 times its steps and 1.2 times its loss, four at 2.56 and 1.44."""
    study = study_of(rows_of("mlp", "sgd", falling(6400, 10)))
    cell = study.cells["mlp", "sgd", 64]
    assert sensitivity.share_of_loss(cell, 1.25) == pytest.approx(5 / 9)
    assert sensitivity.share_of_loss(cell, 1.1) == pytest.approx(1 / 9)
    assert sensitivity.share_of_steps(cell, 2.0) == pytest.approx(5 / 9)
    assert sensitivity.share_reached(cell) == 1
    sparse = study_of(rows_of("mlp", "sgd", falling(20000), sizes=[64, 256]))  # 312 steps; a budget of 640 at 64
    assert sensitivity.shares_reached(sparse.of_method("mlp", "sgd")) == {64: pytest.approx(5 / 9), 256: 1}
    assert sensitivity.shares_reached(study_of(rows_of("mlp", "sgd", never)).of_method("mlp", "sgd"))[64] == 0
    lost = study_of([*rows_of("mlp", "sgd", falling(6400), sizes=[64])[1:], LOST]).cells["mlp", "sgd", 64]
    assert (len(lost.grid), sensitivity.share_of_loss(lost, 1.5)) == (9, pytest.approx(8 / 9))
    grid = sensitivity.grid_of(cell)
    assert grid.names == ("lr", "momentum") and grid.rows == grid.columns == (0.1, 1.0, 10.0) and grid.tuned == (1, 1)
    assert grid.records[0, 2].settings == {"lr": 0.1, "momentum": 10.0} and grid.edges() == []
    assert sensitivity.dispersion(cell).ratio == pytest.approx(0.432 / ((0.306 + 0.36) / 2))  # 2.5th and 7.5th of 11


def test_a_trend_needs_three_batch_sizes_and_a_change_that_counts() -> None:
    trend = sensitivity.share_trend
    assert trend({64: 0.8, 256: 0.6, 1024: 0.4}) == (sensitivity.Trend.SHRINKS, pytest.approx(-0.4))
    assert trend({64: 0.2, 256: None, 1024: 0.4, 4096: 0.6})[0] is sensitivity.Trend.GROWS
    assert trend({64: 0.5, 256: 0.6, 1024: 0.5})[0] is sensitivity.Trend.LEVEL
    assert trend({64: 0.9, 256: 0.1})[0] is sensitivity.Trend.UNKNOWN


def test_tuned_points_at_an_edge_are_listed() -> None:
    rows = rows_of("mlp", "sgd", falling(6400), sizes=[64])
    low = next(entry for entry in rows if entry["settings"] == {"lr": 10.0, "momentum": 0.1})
    low["reached"] = {"steps": 1.0, "samples": 64.0, "seconds": 0.01, "propagations": 128.0}
    found = sensitivity.tuned_at_edges(study_of(rows))
    where = ["lr 10 is the largest", "momentum 0.1 is the smallest"]
    assert found == [("mlp", "sgd", 64, text) for text in where]
    assert sensitivity.tuned_at_edges(study_of(rows_of("mlp", "sgd", falling(6400), sizes=[64]))) == []


# floors: efficiency is one half at 1600 for 25, at 800 for 50 and so on
@pytest.mark.parametrize(
    ("kfac_floor", "sgd_floor", "expected", "why"),
    [
        (25, 25, "seen", ""),
        (40, 25, "seen", ""),
        (40, 0, "seen", ""),  # SGD's does not even stop
        (10, 40, "not seen", ""),
        (0, 25, "not seen", ""),
        (0, 0, "cannot be decided here", "batch sizes end too early"),
        (0, 12, "cannot be decided here", "batch sizes end too early"),  # 4096 is not 1.5 times 3333
    ],
)
def test_both_outcomes_of_the_published_finding(kfac_floor: float, sgd_floor: float, expected: str, why: str) -> None:
    study = two(kfac_floor, sgd_floor)
    found = scaling.scalings(study)
    finding, reason = verdicts.scales_no_better(found["mlp", "kfac"], found["mlp", "sgd"])
    assert (finding.value, reason) == (expected, why)
    line = next(point for point in words(study).splitlines() if point.startswith("Published finding"))
    assert re.search(rf"critical batch size \(.*\): {expected} \(MLP: .* against SGD's ", line) and why in line


def test_the_finding_needs_seeds_batch_sizes_and_a_start() -> None:
    def finding(study: Any) -> tuple[str, str]:
        found = scaling.scalings(study)
        verdict, why = verdicts.scales_no_better(found.get(("mlp", "kfac")), found.get(("mlp", "sgd")))
        return verdict.value, why

    undecided = "cannot be decided here"
    assert finding(two(10, 40, seeds=(0, 1))) == (undecided, "fewer than 3 seeds that ran every batch size")
    assert finding(two(10, 40, sizes=(64, 256))) == (undecided, "fewer than 3 batch sizes")
    assert finding(study_of(rows_of("mlp", "sgd", falling(9000)))) == (undecided, "not run")
    never_kfac = rows_of("mlp", "sgd", falling(9000, 20)) + rows_of("mlp", "kfac", never)
    assert finding(study_of(never_kfac)) == (undecided, "no target at the smallest batch size")
    # by the medians K-FAC goes on, but one seed stops where SGD's does
    rows = rows_of("mlp", "sgd", falling(20000, 40)) + rows_of("mlp", "kfac", falling(20000, 10))
    for entry in rows:
        if (entry["method"], entry["seed"]) == ("kfac", 2) and entry["batch_size"] > 500:
            entry["reached"]["steps"] = 40.0
    assert finding(study_of(rows)) == (undecided, "seeds disagree")
    # by the medians K-FAC stops before SGD does, but two seeds go on, each in its way
    rows = rows_of("mlp", "sgd", falling(20000, 40)) + rows_of("mlp", "kfac", falling(20000), sizes=(64, 256))
    for size, efficiency in ((1024, (0.3, 1.0, 0.1)), (4096, (0.1, 0.3, 1.0))):
        for seed, stage in enumerate(("grid", "seeds", "seeds")):
            rows.append(row("mlp", "kfac", size, (1.0, 1.0), seed, stage, 20000 / size / efficiency[seed]))
    assert finding(study_of(rows)) == (undecided, "seeds disagree")
