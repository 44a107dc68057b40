"""The soak finds nothing in a short run, and finds what is planted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def soak(folder: Path, *options: str) -> tuple[int, str]:
    """Status and log of ``benchmarks/soak.py``."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--folder", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=400.0,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return run.returncode, run.stdout + run.stderr


def times(log: str) -> dict[str, int]:
    """Event -> how often, from the table."""
    return {event: int(count) for event, count in re.findall(r"^\| ([^|]+) \| (\d+) \|$", log, re.MULTILINE)}


def test_ranks_and_workers_are_killed_and_nothing_is_violated(tmp_path: Path) -> None:
    """At 2 ranks, of which one is killed in a save, then at 3, at 2 and at 1."""
    status, log = soak(tmp_path, "--seed", "10", "--steps", "60", "--longest", "72")
    assert status == 0, log
    assert "Nothing was violated." in log
    found = times(log)
    assert [found[f"life at {ranks} ranks"] for ranks in (1, 2, 3)] == [1, 2, 1]
    assert found["training: one killed in a save"] == 1
    for event in ("checkpoint in the background", "checkpoint in the step"):
        assert found[event] > 0, log
    for event in ("step: nan", "step: skipped", "root worker killed"):
        assert found[event] > 0, log
    assert found["step accepted, and part of the last checkpoint"] > 50
    assert found["ranks of that run"] == 1 and found["states with other bits"] > 0  # sums in another order
    assert float(re.findall(r"largest deviation \| (\S+) of", log)[0]) <= 1e-9


@pytest.mark.skipif(not os.environ.get("SOO_TEST_ALL_ENGINES"), reason="minutes; SOO_TEST_ALL_ENGINES=1")
def test_what_is_planted_is_found(tmp_path: Path) -> None:
    """Steps that the journal has and the optimizer has not, a process left behind, a descriptor and 1 MiB a step."""
    status, log = soak(
        tmp_path,
        *("--seed", "0", "--steps", "60", "--minutes", "0", "--breaks", "step", "process", "descriptor", "memory"),
    )
    assert status == 1, log
    violations = re.findall(r"VIOLATION: (.*)", log)
    grown = [f"{kind} of rank . grew within life 0" for kind in ("descriptors", "memory, MiB")]
    for planted in ("end-0.pt deviates", "process .* goes on after life 0", *grown):
        assert any(re.match(planted, text) for text in violations), log
    deviation = re.findall(r"end-0.pt deviates by (\S+) of the movement", log)[0]
    assert float(deviation) > 1e-6
