"""The study: every method on every task, over batch sizes and grids of equal size.

python recipes/study/run.py --preset smoke          # a minute: does everything work?
python recipes/study/run.py --preset small          # what is committed in results/small
python recipes/study/run.py --preset full --estimate    # says its core-hours, and stops
python recipes/study/run.py --preset small --only ID    # one row again

Each run is a row of results/PRESET/runs.jsonl; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import estimate
import landscape
import records
from plan import Plan, Run, load_extras, make_plan
from pool import Pool
from presets import PRESETS
from progress import Progress, duration
from records import Record

HERE = Path(__file__).resolve().parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--jobs", type=int, help="processes of one thread each; default: all cores")
    parser.add_argument("--tasks", nargs="+", help="of tasks.py; default: the preset's")
    parser.add_argument("--methods", nargs="+", help="of methods.py; default: those of the study")
    parser.add_argument("--only", metavar="ID", help="one run, printed; added where it is not there yet")
    parser.add_argument("--estimate", action="store_true", help="say the number of runs and core-hours, and stop")
    parser.add_argument("--retry", action="store_true", help="run again what ended with an error")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder; PRESET/ is made in it")
    parser.add_argument("--data-dir", type=Path, help="files of MNIST's format, for all tasks")
    parser.add_argument("--extra", type=Path, nargs="+", default=[], help="files that register methods and tasks")
    given = parser.parse_args()
    if given.jobs is not None and given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: at least 1")
    given.jobs = given.jobs or len(os.sched_getaffinity(0))
    return given


class Study:
    """What is there, what is to be run, and where it goes."""

    def __init__(self, given: argparse.Namespace) -> None:
        load_extras(given.extra)
        self.given, self.folder = given, given.results / given.preset
        self.plan: Plan = make_plan(given.preset, given.tasks, given.methods)
        self.rows = {row.id: row for row in records.read(self.folder / "runs.jsonl")}
        self.origin = {"version": _version(), "commit": _commit(), "machine": _machine()}

    def about(self, run: Run) -> dict[str, str]:
        """Where a row comes from."""
        given = self.given
        options = [*(["--data-dir", str(given.data_dir)] if given.data_dir else [])]
        if given.extra:
            options += ["--extra", *map(str, given.extra)]
        words = ["python recipes/study/run.py --preset", given.preset, *options, "--only", run.id]
        return {"command": " ".join(words), **self.origin}

    def solution(self, run: Run) -> Path:
        return self.folder / "solutions" / f"{run.id}.pt"

    def missing(self, cell: tuple[str, str, int]) -> list[Run]:
        """Of the cell's grid; where that is complete, of its tuned point's seeds."""
        grid = [run for run in self.plan.grid(cell) if run.id not in self.rows]
        return grid or [run for run in self.plan.seeds(cell, self.rows.values()) if run.id not in self.rows]

    def left(self, cell: tuple[str, str, int]) -> int:
        """Runs that the cell still needs."""
        grid = sum(run.id not in self.rows for run in self.plan.grid(cell))
        return grid + len(self.plan.preset.seeds) - 1 if grid else len(self.missing(cell))

    def add(self, row: Record) -> None:
        records.append(self.folder / "runs.jsonl", row)
        self.rows[row.id] = row

    def drop_errors(self) -> None:
        """Take rows with an error out of the file, which is replaced in one move."""
        kept = [row for row in self.rows.values() if row.error is None]
        path, temporary = self.folder / "runs.jsonl", self.folder / "runs.tmp"
        if len(kept) < len(self.rows):
            temporary.unlink(missing_ok=True)
            for row in kept:
                records.append(temporary, row)
            os.replace(temporary, path) if kept else path.unlink()
            self.rows = {row.id: row for row in kept}

    def best(self, cell: tuple[str, str, int]) -> str:
        """The best so far of a cell, in words."""
        name = " ".join(map(str, cell))
        point = records.tuned(row for row in self.rows.values() if row.cell == cell)
        if point is None:
            return f"{name}: nothing yet"
        if point.reached is not None:
            return f"{name}: best {point.reached['steps']:.0f} steps to {point.target:g}"
        return f"{name}: best loss {point.loss:.3g}, target {point.target:g} not reached"


def check_data(study: Study, pool: Pool) -> None:
    """Read the data of every task, and say what they are.

    Raises:
        SystemExit: they are not there, or rows that are there were made on others.
    """
    from trial import data_of

    tasks, names, given = iter(study.plan.tasks), dict[str, str](), study.given
    for task, name, error in pool.work(
        lambda: next(tasks, None), lambda task: (data_of, (given.preset, task, given.data_dir))
    ):
        if error is not None:
            raise SystemExit(f"{task}: {error}")
        others = {row.data for row in study.rows.values() if row.task == task and row.data} - {name}
        if others:
            raise SystemExit(
                f"{study.folder}/runs.jsonl has {task} on {', '.join(sorted(others))}; here it is {name}: "
                "pass the same --data-dir, or --results for another folder"
            )
        names[task] = name
    print("data: " + ", ".join(f"{task} on {names[task]}" for task in study.plan.tasks), flush=True)


def train(study: Study, pool: Pool) -> None:
    """Every run that is missing; a cell's seeds follow as soon as its grid is complete."""
    from trial import perform

    cells = [cell for cell in study.plan.cells() if study.left(cell)]
    total = study.plan.runs()
    done = total - sum(map(study.left, cells))
    size = study.plan.preset
    print(
        f"{study.plan.name}: {total} runs ({done} are there): {len(study.plan.tasks)} tasks, {len(study.plan.methods)} "
        f"methods, {' x '.join(map(str, size.grid))} grids, {len(size.seeds)} seeds of each tuned point",
        flush=True,
    )
    expected, failed = estimate.costs(study.plan, cells, pool, study.given.data_dir)
    seconds = sum(expected[cell] * study.left(cell) for cell in cells)
    for line in failed:
        print(f"not in the estimate: {line}")
    if study.given.estimate and cells:
        print("core-hours:", *estimate.table(study.plan, expected), sep="\n")
    jobs = study.given.jobs
    print(
        f"estimate: {seconds / 3600:.2f} core-hours, {duration(seconds / jobs)} on {jobs} cores of this machine "
        "(from a few timed steps)",
        flush=True,
    )
    if study.given.estimate:
        return
    progress = Progress(total, done, seconds, jobs, before=sum(row.total_seconds for row in study.rows.values()))
    queue = deque(run for cell in cells for run in study.missing(cell))
    open_runs = {cell: sum(run.cell == cell for run in queue) for cell in cells}

    def call(run: Run) -> Any:
        keep = study.solution(run) if run.keep else None
        return perform, (run, study.given.data_dir, keep, study.about(run))

    try:
        for run, result, error in pool.work(lambda: queue.popleft() if queue else None, call):
            row = _failed(run, study.about(run), error) if error is not None else result
            study.add(row)
            if row.error is not None:
                progress.say(f"{run.describe()}: {row.error}")
            open_runs[run.cell] -= 1
            if not open_runs[run.cell] and run.stage == "grid":
                more = study.missing(run.cell)
                open_runs[run.cell] = len(more)
                progress.total -= len(size.seeds) - 1 if not more else 0
                queue.extendleft(reversed(more))
            progress.add(row.total_seconds, expected[run.cell], study.best(run.cell))
    finally:
        progress.end()


def look_around(study: Study, pool: Pool) -> None:
    """The landscapes that are missing."""
    path = study.folder / "landscapes.json"
    planes = landscape.read(path)
    there = {plane["id"] for plane in planes}
    todo = deque(run for run in landscape.wanted(study.plan, study.rows.values()) if run.id not in there)
    progress = Progress(len(todo), 0, 0.0, study.given.jobs)
    if todo:
        print(f"{len(todo)} landscapes around tuned solutions", flush=True)
    for run, plane, error in pool.work(
        lambda: todo.popleft() if todo else None,
        lambda run: (landscape.plane, (run, study.solution(run), study.given.data_dir)),
    ):
        if error is not None:
            progress.say(f"no landscape: {error}")
            continue
        same = tuple(plane[name] for name in ("task", "method", "batch_size"))
        planes = [p for p in planes if tuple(p[name] for name in ("task", "method", "batch_size")) != same]
        landscape.write(path, [*planes, plane])
        planes = landscape.read(path)
        progress.add(0.0, 0.0, run.describe())
    progress.end() if planes else None


def only(study: Study, id: str) -> None:
    """One run, in this process."""
    import torch
    from trial import perform

    torch.set_num_threads(1)
    run = study.plan.find(id)
    if run is None:
        raise SystemExit(f"--only {id}: preset {study.plan.name} has no run of this id")
    row = perform(run, study.given.data_dir, None, study.about(run))
    if id not in study.rows:
        study.add(row)
    print(json.dumps({**asdict(row), **records.finite_parts(row)}))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One study at a time writes to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another study is writing to {folder}: wait for it, or pass --results") from None
        yield


def _failed(run: Run, about: dict[str, str], error: str) -> Record:
    names = ("id", "preset", "task", "method", "batch_size", "seed", "stage", "epochs", "target")
    nothing: dict[str, float | None] = dict.fromkeys(records.COLUMNS[4:])
    return Record(
        **{name: getattr(run, name) for name in names},
        settings=dict(run.settings),
        steps=0,
        samples=0,
        seconds=0.0,
        wall_seconds=0.0,
        propagations=0.0,
        reached=None,
        final=nothing,
        best=nothing,
        diverged=False,
        error=error,
        **about,
    )


def _version() -> str:
    from lightning_soo import __version__

    return __version__


def _commit() -> str:
    """Of the repository, with ``-dirty`` where files differ; results do not count."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){HERE / 'results'}")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _machine() -> str:
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = (
            line.split(":", 1)[1] for line in information.read_text().splitlines() if line.startswith("model name")
        )
        model = next(names, model).strip()
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {platform.system()}, Python {platform.python_version()}, torch {version('torch')}"


def main() -> None:
    given = parse()
    if given.only:
        only(Study(given), given.only)
        return
    with alone(given.results / given.preset):
        study = Study(given)
        if given.retry:
            study.drop_errors()
        try:
            with Pool(given.jobs, [path.resolve() for path in given.extra]) as pool:
                check_data(study, pool)
                train(study, pool)
                if not given.estimate:
                    look_around(study, pool)
        except KeyboardInterrupt:
            print(f"stopped; {len(study.rows)} rows are kept, the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
