"""One run: training, its clocks and its evaluations, to a row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from methods import METHODS
from plan import Run
from presets import PRESETS
from records import COLUMNS, Record, finite, reached
from tasks import TASKS, Problem
from torch import Tensor, nn

DIVERGED = 10.0  # times the loss before any step
FROM_FIRST_ORDER = 2.0  # propagations through an example in a step: forward and backward


@lru_cache(maxsize=1)  # runs come task by task
def problem_of(preset: str, task: str, data_dir: Path | None) -> Problem:
    return TASKS[task].make(PRESETS[preset].task(task).size, data_dir)


def begin(run: Run, problem: Problem) -> tuple[nn.Module, Any]:
    """Model and optimizer: the seed gives every method the same initial weights."""
    torch.manual_seed(run.seed)
    model = problem.model()
    return model, METHODS[run.method].make(model, seed=run.seed, **dict(run.settings))


def batches(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices without end, in an order given by seed and epoch: the same for every method."""
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch_size * batch_size].split(batch_size)
        epoch += 1


class Stepper:
    """A step of any method, and what it has cost so far.

    Args:
        optimizer: a torch optimizer; or one with ``step_on(loss_of, batch)``, which evaluates the loss itself and
            counts ``propagations``, and whose ``last`` says how the step went.
    """

    def __init__(self, model: nn.Module, optimizer: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        options = getattr(optimizer, "options", None)
        self.gauss_newton = getattr(options, "curvature", None) == "gauss_newton"  # its closures return outputs too
        self.counts: dict[str, int] = {}
        self._propagations = 0.0
        if hasattr(optimizer, "step_on"):
            self.counts = {"rejected": 0, "negative_curvature": 0, "cg_iterations": 0}

    @property
    def propagations(self) -> float:
        return float(self.optimizer.propagations) if self.counts else self._propagations

    def __call__(self, inputs: Tensor, targets: Tensor) -> float:
        """Take a step; returns the loss of the batch before it."""
        if self.counts:
            return self._step_on(inputs, targets)
        self.optimizer.zero_grad()
        loss = self.loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self._propagations += FROM_FIRST_ORDER * len(inputs)
        return float(loss.detach())

    def _step_on(self, inputs: Tensor, targets: Tensor) -> float:
        def loss_of(batch: tuple[Tensor, Tensor]) -> Any:
            outputs = self.model(batch[0])
            loss = self.loss(outputs, batch[1])
            return (loss, outputs) if self.gauss_newton else loss

        loss = self.optimizer.step_on(loss_of, (inputs, targets))
        group = self.optimizer.param_groups[0]
        self.counts = {
            "rejected": int(group["steps"] - group["accepted"]),
            "negative_curvature": int(group["negative_curvature"]),
            "cg_iterations": int(group["cg_iterations"]),
        }
        return float(loss)


@torch.no_grad()
def evaluate(model: nn.Module, problem: Problem, pair: tuple[Tensor, Tensor], accuracy: bool) -> tuple[float, float]:
    """Mean loss, and accuracy (NaN where it means nothing)."""
    model.eval()
    loss = right = 0.0
    for inputs, targets in zip(pair[0].split(1024), pair[1].split(1024), strict=True):
        outputs = model(inputs)
        loss += float(problem.loss(outputs, targets)) * len(inputs)
        right += float((outputs.argmax(1) == targets).sum()) if accuracy else math.nan
    model.train()
    return loss / len(pair[0]), right / len(pair[0])


class Course:
    """The curve of a run: evaluations stand outside the clocks."""

    def __init__(self, run: Run, problem: Problem, model: nn.Module) -> None:
        self.run, self.problem, self.model = run, problem, model
        examples = PRESETS[run.preset].evaluation_examples
        self.subset = (problem.training[0][:examples], problem.training[1][:examples])
        self.accuracy = TASKS[run.task].accuracy
        self.rows: list[list[float]] = []

    def add(self, steps: int, seconds: float, propagations: float) -> float:
        """Evaluate; returns the training loss."""
        training, _ = evaluate(self.model, self.problem, self.subset, False)
        validation, accuracy = evaluate(self.model, self.problem, self.problem.validation, self.accuracy)
        clocks = [steps, steps * self.run.batch_size, seconds, propagations]
        self.rows.append([*clocks, training, validation, accuracy])
        return training

    def last(self) -> dict[str, float]:
        return dict(zip(COLUMNS[4:], self.rows[-1][4:], strict=True))

    def best(self) -> dict[str, float]:
        columns = list(zip(*self.rows, strict=True))[4:]
        known = [[value for value in column if math.isfinite(value)] or [math.nan] for column in columns]
        return dict(zip(COLUMNS[4:], (min(known[0]), min(known[1]), max(known[2])), strict=True))


def perform(run: Run, data_dir: Path | None, keep: Path | None, about: Mapping[str, str]) -> Record:
    """Train, and say how it went. What goes wrong inside is recorded with its error.

    Args:
        data_dir: of the task.
        keep: file for the solution.
        about: command, version, commit and machine of the row.
    """
    began = time.process_time()
    problem = problem_of(run.preset, run.task, data_dir)
    torch.manual_seed(run.seed)
    course = Course(run, problem, problem.model())
    done, seconds, wall, error, diverged = 0, 0.0, 0.0, None, False
    stepper: Stepper | None = None
    start = course.add(0, 0.0, 0.0)
    every = math.ceil(run.steps / PRESETS[run.preset].evaluations)
    try:
        model, optimizer = begin(run, problem)
        course.model, stepper = model, Stepper(model, optimizer, problem.loss)
        order = batches(len(problem.training[0]), run.batch_size, run.seed)
        for step in range(1, run.steps + 1):
            chosen = next(order)
            inputs, targets = problem.training[0][chosen], problem.training[1][chosen]
            cpu, clock = time.process_time(), time.perf_counter()
            loss = stepper(inputs, targets)
            seconds, wall, done = seconds + time.process_time() - cpu, wall + time.perf_counter() - clock, step
            diverged = not loss <= DIVERGED * start
            if diverged or step % every == 0 or step == run.steps:
                loss = course.add(step, seconds, stepper.propagations)
                diverged = diverged or not loss <= DIVERGED * start
            if diverged:
                break
        if keep is not None and not diverged:
            keep.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), keep)
    except Exception as raised:  # one method that fails must not end the study
        error = f"{type(raised).__name__}: {raised}"
    return Record(
        id=run.id,
        preset=run.preset,
        task=run.task,
        method=run.method,
        batch_size=run.batch_size,
        settings=dict(run.settings),
        seed=run.seed,
        stage=run.stage,
        epochs=run.epochs,
        steps=done,
        samples=done * run.batch_size,
        seconds=seconds,
        wall_seconds=wall,
        propagations=stepper.propagations if stepper else 0.0,
        target=run.target,
        reached=reached(finite(course.rows), run.target),
        final=finite(course.last()),
        best=finite(course.best()),
        diverged=diverged,
        counts=stepper.counts if stepper else {},
        curve=finite(course.rows),
        data=problem.data,
        error=error,
        total_seconds=float(f"{time.process_time() - began:.6g}"),
        **about,
    )


def data_of(preset: str, task: str, data_dir: Path | None) -> str:
    """Name of the data set, once it has been read."""
    return problem_of(preset, task, data_dir).data


def time_steps(runs: list[Run], data_dir: Path | None, most: int = 11, budget: float = 0.5) -> dict[int, float]:
    """Processor seconds of a step by batch size; refreshes of roots are among them.

    Args:
        runs: of one method and task with ascending batch sizes; the first whose steps take a second ends it.
        most: steps at most, besides a first one that is not counted where there are others.
        budget: seconds after which it is enough.
    """
    found: dict[int, float] = {}
    for run in runs:
        problem = problem_of(run.preset, run.task, data_dir)
        model, optimizer = begin(run, problem)
        stepper = Stepper(model, optimizer, problem.loss)
        order = batches(len(problem.training[0]), run.batch_size, run.seed)
        spent: list[float] = []
        while len(spent) <= most and sum(spent) < budget:
            chosen = next(order)
            inputs, targets = problem.training[0][chosen], problem.training[1][chosen]
            cpu = time.process_time()
            stepper(inputs, targets)
            spent.append(time.process_time() - cpu)
        kept = spent[1:] or spent
        found[run.batch_size] = sum(kept) / len(kept)
        if found[run.batch_size] > 1.0:
            break
    return found


def time_evaluation(run: Run, data_dir: Path | None, examples: int = 512) -> float:
    """Processor seconds of an evaluation, from some of its examples."""
    problem = problem_of(run.preset, run.task, data_dir)
    model = problem.model()
    subset = (problem.training[0][:examples], problem.training[1][:examples])
    evaluate(model, problem, subset, False)
    cpu = time.process_time()
    evaluate(model, problem, subset, False)
    count = PRESETS[run.preset].evaluation_examples + len(problem.validation[0])
    return (time.process_time() - cpu) / len(subset[0]) * count
