"""Executors under DDP of 2 and 3 ranks: the same bits, late, killed or failing."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import torchrun


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_executor_late_killed_and_failing(ranks: int, tmp_path: Path) -> None:
    torchrun(Path(__file__).parent / "worker_refresh.py", ranks, tmp_path)
    errors = {(tmp_path / f"error{rank}.txt").read_text() for rank in range(ranks)}
    assert len(errors) == 1
    (text,) = errors
    assert "3 refreshes in a row failed on rank" in text and "started at step" in text and "overrides" in text
