"""The benchmarks run: on a model of a few numbers, and without a word about how fast."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import exchange
import levers
import roots
import scaling
import search
import step_time
import target_report
import training
from clock import Clock
from contenders import Contender, Unsuited, choose, from_library, torch_muon
from run_store import Point, Store
from tasks import Task
from trained_tasks import TrainedTask

TARGET = torch.linspace(-1.0, 1.0, 36).view(6, 6)


def tiny(seed: int = 0) -> Task:
    def model() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Linear(6, 6)

    return Task(
        name="tiny",
        model=model,
        batch=lambda step: torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * seed + step)),
        loss=lambda net, x: (net(x) - x @ TARGET).square().mean(),
        flops=1.0,
    )


TINY = TrainedTask(
    key="tiny",
    title="tiny",
    at_seed=tiny,
    evaluate=lambda net: float((net.weight.T - TARGET).square().mean()),
    longest=40,
)


def test_step_time_prints_a_row_for_every_contender() -> None:
    rates = dict.fromkeys(("float32", "bfloat16", "memory", "eigh"), 1.0)
    chosen = choose(["AdamW fused", "SGD", "Muon", "ours"])
    lines = step_time.measure(tiny(), rates, 2, chosen)
    for name in ("AdamW foreach", "AdamW fused", "ours, defaults", "ours, float32"):
        row = next(line for line in lines if line.startswith(f"| {name} |"))
        assert len(row.split("|")) == 8 and float(row.split("|")[5]) > 0
    assert any(line.startswith("Muon: ") for line in lines)  # the only layer is the output


def test_muon_takes_the_matrices_between_embedding_and_output() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 7))
    muon, adamw = torch_muon(net, 1e-3).parts
    assert [p.shape for p in muon.param_groups[0]["params"]] == [(5, 4), (5, 5)]
    assert len(adamw.param_groups[0]["params"]) == 9 - 2
    with pytest.raises(Unsuited):
        torch_muon(nn.Conv2d(3, 4, 3), 1e-3)


def formula(calls: list[tuple[float, int, int]], stop_after: float = math.inf) -> search.Runner:
    """Losses known beforehand: best at 2e-2, the lower the longer."""

    def run(contender: Contender, lr: float, horizon: int, seed: int) -> dict[str, Any]:
        if len(calls) >= stop_after:
            raise KeyboardInterrupt
        calls.append((lr, horizon, seed))
        loss = abs(math.log(lr / 2e-2)) + 50 / horizon + 0.3 * (seed == 1)
        return {"loss": loss, "curve": [(horizon, loss)]}

    return run


def test_the_search_finds_what_a_scan_of_everything_finds(tmp_path: Path) -> None:
    contender = choose(None)[0]
    calls: list[tuple[float, int, int]] = []
    found = search.Search(Store("tiny", tmp_path), contender, 200, 1, formula(calls))
    target = 1.0  # 50 steps at the best learning rate
    everything = [n for n in search.horizons(200) if 50 / n <= target]
    assert found.best(200) == (2e-2, 0.25)  # outside of the grid that everybody gets first
    assert found.fewest(target) == min(everything)
    assert found.fewest(0.2) is None
    # the second seed ends 0.3 higher: as many steps more as its target asks for
    assert found.confirmed([target, target]) == (2e-2, min(n for n in everything if 50 / n + 0.3 <= target))
    assert len(calls) == len(set(calls))


def test_a_learning_rate_that_one_seed_does_not_bear_is_left(tmp_path: Path) -> None:
    """The next one that ends at the target with every seed is taken, at the same number of steps."""

    def run(contender: Contender, lr: float, horizon: int, seed: int) -> dict[str, Any]:
        loss = 9.0 if seed == 1 and lr > 1.5e-2 else 0.1 * abs(math.log(lr / 2e-2)) + 50 / horizon
        return {"loss": loss, "curve": [(horizon, loss)]}

    found = search.Search(Store("tiny", tmp_path), choose(None)[0], 200, 1, run)
    target = 1.0
    lr, steps = found.confirmed([target, target]) or (0.0, 0)
    assert lr == 1e-2 and steps == min(n for n in search.horizons(200) if 0.1 * math.log(2) + 50 / n <= target)


def test_a_killed_search_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    contender = choose(None)[0]
    whole: list[tuple[float, int, int]] = []
    search.Search(Store("tiny", tmp_path / "whole"), contender, 200, 1, formula(whole)).fewest(1.0)
    before: list[tuple[float, int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        search.Search(Store("tiny", tmp_path), contender, 200, 1, formula(before, stop_after=5)).fewest(1.0)
    with (tmp_path / "tiny.jsonl").open("a") as file:
        file.write('{"task": "tiny", "loss"')  # killed while it wrote
    after: list[tuple[float, int, int]] = []
    search.Search(Store("tiny", tmp_path), contender, 200, 1, formula(after)).fewest(1.0)
    assert before + after == whole
    with pytest.raises(search.Missing, match=r"seed 2"):
        search.Search(Store("tiny", tmp_path), contender, 200, 1).row(3e-4, 200, seed=2)
    assert len(Store("tiny", tmp_path).lines.read()) == len(whole)


def test_runs_of_other_options_are_other_runs(tmp_path: Path) -> None:
    store = Store("tiny", tmp_path)
    one, other = from_library("ours"), from_library("ours", precondition_frequency=7)
    calls: list[tuple[float, int, int]] = []
    for contender in (one, other):
        search.Search(store, contender, 40, 1, formula(calls)).row(1e-3, 40)
    assert len(calls) == 2
    again = Store("tiny", tmp_path)
    assert again.get(Point.of(one.options, 1e-3, 40, 0, 1)) is not None
    for changed in ({"threads": 2}, {"seed": 1}, {"horizon": 39}, {"lr": 2e-3}):
        given = {"options": one.options, "lr": 1e-3, "horizon": 40, "seed": 0, "threads": 1, **changed}
        assert again.get(Point.of(**given)) is None
    # workers change no number
    assert from_library("ours", workers="inline").options == one.options


def test_runs_are_the_same_clocked_or_not_and_schedules_end_at_zero() -> None:
    adamw, *_ = choose(None)
    ours = from_library("ours", precondition_frequency=5, start_preconditioning_step=2)
    for contender in (adamw, ours):
        run = training.train(TINY, contender, 1e-1, 40, 1)
        clocked = training.train(TINY, contender, 1e-1, 40, 1, clocked=True)
        assert clocked["loss"] == run["loss"] < 0.1
        assert [step for step, _ in clocked["times"]] == [step for step, _ in run["curve"]] == training.curve_steps(40)
        seconds = [seconds for _, seconds in clocked["times"]]
        assert seconds == sorted(seconds) and seconds[-1] <= clocked["seconds"]
    factors = [training.factor(step, 40, 40) for step in range(41)]
    assert factors[:3] == [0.5, 1.0, 1.0] and factors[40] == 0.0
    assert all(a > b for a, b in itertools.pairwise(factors[2:]))


def test_levers_compare_settings_at_equal_steps(tmp_path: Path) -> None:
    settings = [{}, {"grafting": "sgd"}]
    arguments = (TINY, "shampoo", settings, [1e-1], 2, 1, Store("tiny", tmp_path), {}, 40)
    lines = levers.measure(*arguments)
    for given, line in zip(settings, lines[2:], strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        alone = [training.train(TINY, from_library("ours", **given), 1e-1, 40, seed)["loss"] for seed in (0, 1)]
        assert [float(loss) for loss in cells[2].split(",")] == pytest.approx(alone, rel=1e-4)
        assert float(cells[3]) == pytest.approx(sum(alone) / 2, rel=1e-4)
    assert lines[2].split("|")[3] != lines[3].split("|")[3]
    size = (tmp_path / "tiny.jsonl").stat().st_size
    assert levers.measure(*arguments) == lines and (tmp_path / "tiny.jsonl").stat().st_size == size  # none twice


def test_the_page_of_a_task_and_turns_that_are_kept_when_whole(tmp_path: Path) -> None:
    adamw, fused, *_ = choose(["AdamW", "ours, defaults"])
    ours = from_library("ours", precondition_frequency=5, start_preconditioning_step=2)
    store = Store("tiny", tmp_path)
    one, two = (
        search.Search(store, contender, 40, 1, training_of(TINY), {"where": f"{name} (model 1; avx2), 1 threads"})
        for contender, name in ((adamw, "here"), (ours, "elsewhere"))
    )
    lr, _ = one.best(40)
    own = [one.loss(lr, 40, seed) for seed in range(3)]
    pairs = [(one, adamw), (one, fused), (two, ours)]
    for pair in pairs:
        target_report.found_of(*pair, [0.05], own)
    everyone = target_report.complete(pairs, [0.05], own)
    assert [found.name for found in everyone] == ["AdamW foreach", "AdamW fused", "ours"]
    assert everyone[0].point is not None
    clock = Clock("tiny", everyone[0].point, 1, tmp_path)
    entries = {found.longest: 2 for found in everyone}
    left = iter(range(4))  # killed in the second turn

    def run(*arguments: Any) -> dict[str, Any]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return training.train(TINY, *arguments, clocked=True)

    here = {"where": "here (model 1; avx2), 1 threads; commit 1"}
    with pytest.raises(KeyboardInterrupt):
        clock.take(entries, run, here)
    assert len(clock.lines.read()) == 1
    left = itertools.count()
    clock.take(entries, run, here)
    assert [row["seed"] for row in clock.lines.read()] == [0, 1]
    assert [run.ratio for run in clock.runs(everyone[0].point)] == [1.0, 1.0]
    assert [run.loss for run in clock.runs(everyone[0].longest)] == own[:2]
    lines = target_report.tables(TINY, everyone, clock, own, "here")
    assert sum(line.startswith("| ours |") for line in lines) == 3
    found = "on here (model 1): AdamW foreach, AdamW fused; on elsewhere (model 1): ours."
    assert lines[2:4] == [f"{here['where']}.", f"Learning rates, steps and targets were found {found}"]
    alone = target_report.tables(TINY, everyone[:2], clock, own, "another (model 2; avx2), 1 threads")
    assert alone[2] == lines[2] and "were found" not in alone[3]  # not the machine that writes the page
    # a further target that was searched for AdamW alone
    asked = [(search.Search(store, pair.contender, 40, 1), contender) for pair, contender in pairs]
    further = 1.001 * two.best(40)[1]
    one.fewest(further)
    lines = target_report.tables(TINY, target_report.complete(asked, [further], own), clock, own, "here")
    assert "| ours | not searched |" in lines[: lines.index("## Equal horizons: everybody's best run of 40 steps")]
    target_report.picture(TINY, everyone, clock, own, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def training_of(task: TrainedTask) -> Callable[..., dict[str, Any]]:
    return lambda *arguments: training.train(task, *arguments)


def test_roots_are_compared_with_known_ones() -> None:
    matrix, root = roots.known(24, 1e6)
    assert np.linalg.cond(matrix) == pytest.approx(1e6, rel=1e-6)
    assert np.abs(root @ root @ root @ root @ matrix - np.eye(24)).max() < 1e-8
    rows = roots.measure([24], 24, 1)
    assert len(rows) == 3 and [float(row.split("|")[5]) < 1e-3 for row in rows] == [True, True, True]


def test_rows_of_exchange_and_scaling() -> None:
    size = {"bytes": 2048, "milliseconds": 1.0}
    one = {
        "received": {"all_to_all": 1024.0, "broadcast": 1024.0},
        "planned": {"gradients": 1024.0, "roots": 1024.0, "statistics": 0.0},
        "exchange_bytes": 0,
        "milliseconds": 3.0,
        "alternatives": {"gradients": size, "roots": size},
    }
    assert exchange.row("ddp", 2, [one, {**one, "milliseconds": 4.0}]).split(" | ")[2:6] == [
        *("2 (all_to_all 1, broadcast 1)", "2", "0", "4.0")
    ]
    fast, slow = (
        {"seconds": {"adamw": [a], "shampoo": [b]}, "received": 1024.0, "state": 2**20, "load": 1.0}
        for a, b in ((0.1, 0.3), (0.2, 0.2))
    )
    assert scaling.row(2, 4, [fast, slow]).split(" | ")[3:6] == ["200", "300", "1.50 [1.50, 1.50]"]
