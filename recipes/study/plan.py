"""Which runs a preset consists of, in which order, and what makes a run the same run. Needs no torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import records
from methods import METHODS
from presets import PRESETS, Preset
from records import Record
from tasks import TASKS
from thresholds import target_of


@dataclass(frozen=True)
class Run:
    """What a worker needs to make a Record; the fields that both have mean the same.

    Args:
        settings: pairs of name and value.
        steps: of the whole budget.
        keep: whether the solution is kept for a landscape.
    """

    preset: str
    task: str
    method: str
    batch_size: int
    settings: tuple[tuple[str, float], ...]
    seed: int
    stage: str
    epochs: float
    steps: int
    target: float
    keep: bool = False

    @property
    def id(self) -> str:
        """Of everything that decides the numbers; not of the stage, since a grid's run is also its seed's."""
        names = ("preset", "task", "method", "batch_size", "seed", "epochs")
        return records.identify({**{name: getattr(self, name) for name in names}, "settings": dict(self.settings)})

    @property
    def cell(self) -> tuple[str, str, int]:
        return self.task, self.method, self.batch_size

    def describe(self) -> str:
        """For people."""
        values = ", ".join(f"{name} {value:g}" for name, value in self.settings)
        return f"{self.task} {self.method} batch {self.batch_size}, {values}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """
    Args:
        tasks, methods: names, in the order in which they are run.
    """

    name: str
    preset: Preset
    tasks: tuple[str, ...]
    methods: tuple[str, ...]

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """Task by task: what is there when a study is interrupted is whole."""
        for task in self.tasks:
            for batch_size in self.preset.task(task).batch_sizes:
                for method in self.methods:
                    yield task, method, batch_size

    def grid(self, cell: tuple[str, str, int]) -> list[Run]:
        """The grid of one cell, with the first seed."""
        task, method, _ = cell
        points = METHODS[method].grid(self.preset.grid, TASKS[task].scales.get(method, (1.0, 1.0)))
        return [self._run(cell, tuple(point.items()), self.preset.seeds[0], "grid") for point in points]

    def seeds(self, cell: tuple[str, str, int], rows: Iterable[Record]) -> list[Run]:
        """Further seeds of the cell's tuned point; none where every run of the grid diverged.

        Args:
            rows: at least those of the cell's grid.
        """
        asked = {run.id for run in self.grid(cell)}
        point = records.tuned(row for row in rows if row.id in asked)
        if point is None:
            return []
        settings = tuple(point.settings.items())
        return [self._run(cell, settings, seed, "seeds") for seed in self.preset.seeds[1:]]

    def runs(self) -> int:
        """How many there are in all."""
        points = self.preset.points + len(self.preset.seeds) - 1
        return points * sum(1 for _ in self.cells())

    def find(self, id: str) -> Run | None:
        """The run of this id, whether its point was tuned or not."""
        for cell in self.cells():
            for point in self.grid(cell):
                for seed in self.preset.seeds:
                    if seed != point.seed:
                        point = replace(point, seed=seed, stage="seeds", keep=False)
                    if point.id == id:
                        return point
        return None

    def _run(self, cell: tuple[str, str, int], settings: tuple[tuple[str, float], ...], seed: int, stage: str) -> Run:
        task, method, batch_size = cell
        size = self.preset.task(task)
        target = TASKS[task].targets.get(self.name)
        return Run(
            preset=self.name,
            task=task,
            method=method,
            batch_size=batch_size,
            settings=settings,
            seed=seed,
            stage=stage,
            epochs=size.epochs(batch_size),
            steps=size.steps(batch_size),
            target=target_of(self.name, task) if target is None else target,
            keep=stage == "grid" and batch_size in (size.batch_sizes[0], size.batch_sizes[-1]),
        )


def make_plan(name: str, tasks: Sequence[str] | None, methods: Sequence[str] | None) -> Plan:
    """
    Args:
        name: of the preset.
        tasks, methods: None for the preset's tasks and all default methods.

    Raises:
        SystemExit: an unknown name.
    """
    preset = PRESETS[name]
    tasks = [task for task in TASKS if task in preset.tasks] if tasks is None else tasks
    methods = [method for method, entry in METHODS.items() if entry.default] if methods is None else methods
    for kind, names, known in (("task", tasks, TASKS), ("method", methods, METHODS)):
        for unknown in (entry for entry in names if entry not in known):
            raise SystemExit(f"--{kind}s {unknown}: there are {', '.join(known)}")
    return Plan(name, preset, tuple(tasks), tuple(methods))


def load_extras(paths: Iterable[Path]) -> None:
    """Run files that register further methods and tasks.

    Raises:
        SystemExit: there is no such file.
    """
    for path in paths:
        spec = importlib.util.spec_from_file_location(f"study_extra_{path.stem}", path)
        if spec is None or spec.loader is None or not path.exists():
            raise SystemExit(f"--extra {path}: no Python file of this name")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
