"""The rows of the study: one JSON object a line, appended when a run ends. Needs no torch.

Numbers that are not finite are written as null, which JSON has, and read as None.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

# columns of a curve
COLUMNS = ("steps", "samples", "seconds", "propagations", "train_loss", "validation_loss", "accuracy")
CLOCKS = COLUMNS[:4]
STAGES = ("grid", "seeds")


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        id: of the run's settings, see :func:`identify`.
        settings: the two axes of the method's grid, in the registry's order.
        stage: ``"grid"``, or ``"seeds"`` for further seeds of a tuned point, whose grid run is its first seed.
        epochs: the budget. steps, samples: what was done, less where the run diverged or failed.
        seconds: of the process's processor time, training alone; wall_seconds: the same by the clock on the wall.
        total_seconds: of processor time with evaluations and the reading of data: what the study has cost.
        propagations: forward or backward passes through one example.
        target: training loss. reached: the clocks at which it was first at or below the target, None where it never
            was.
        final, best: ``train_loss``, ``validation_loss`` and ``accuracy`` at the end, and the best of each.
        counts: of trust-region methods: ``rejected``, ``negative_curvature``, ``cg_iterations``.
        curve: rows of COLUMNS, the first before any step.
        data: name of the data set.
        error: of a run that failed.
    """

    id: str
    preset: str
    task: str
    method: str
    batch_size: int
    settings: dict[str, float]
    seed: int
    stage: str
    epochs: float
    steps: int
    samples: int
    seconds: float
    wall_seconds: float
    propagations: float
    target: float
    reached: dict[str, float] | None
    final: dict[str, float | None]
    best: dict[str, float | None]
    diverged: bool
    counts: dict[str, int] = field(default_factory=dict)
    curve: list[list[float | None]] = field(default_factory=list)
    command: str = ""
    version: str = ""
    commit: str = ""
    machine: str = ""
    data: str = ""
    error: str | None = None
    total_seconds: float = 0.0

    @property
    def cell(self) -> tuple[str, str, int]:
        """Task, method and batch size: what a grid belongs to."""
        return self.task, self.method, self.batch_size

    @property
    def loss(self) -> float:
        """Final training loss; infinite where the run diverged or failed."""
        value = self.final.get("train_loss")
        return math.inf if self.diverged or self.error or value is None else value


def identify(settings: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that say which run it is."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def finite(value: Any) -> Any:
    """The same with None for numbers that are not finite, and six significant digits."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read(path: Path) -> list[Record]:
    """Every row of the file, none where there is no file; a last line that was cut off is dropped.

    Raises:
        ValueError: a line before the last is no row; names it.
    """
    if not path.exists():
        return []
    known = {f.name for f in fields(Record)}
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # the last one ends without a newline: empty, or cut off
        try:
            values = json.loads(line)
            found.append(Record(**{name: value for name, value in values.items() if name in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a row of the study ({error}); delete it") from error
    return found


def append(path: Path, record: Record) -> None:
    """Add a row in one write; what a killed process left of its last line is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**asdict(record), **finite_parts(record)}, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        file.seek(0)
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()


def finite_parts(record: Record) -> dict[str, Any]:
    """What of a row was measured, as JSON can hold it; settings and targets stay as they were given."""
    names = ("seconds", "wall_seconds", "propagations", "reached", "final", "best", "curve")
    return {name: finite(getattr(record, name)) for name in names}


def tuned(records: Iterable[Record]) -> Record | None:
    """The tuned point of one cell's grid: fewest steps to the target, else the lowest final training loss.

    None where every run diverged or failed.
    """
    mine = [record for record in records if record.stage == "grid"]
    arrived = [record for record in mine if record.reached is not None and record.error is None]
    if arrived:
        return min(arrived, key=lambda record: record.reached["steps"])  # type: ignore[index]
    ended = [record for record in mine if math.isfinite(record.loss)]
    return min(ended, key=lambda record: record.loss) if ended else None


def seeds_of(records: Iterable[Record], point: Record) -> list[Record]:
    """The runs of a tuned point: its grid run, and those of its further seeds."""
    return [record for record in records if record.cell == point.cell and record.settings == point.settings]


def reached(curve: list[list[float | None]], target: float) -> dict[str, float] | None:
    """The clocks at which a curve is first at or below the target.

    Between two evaluations the logarithm of the loss is taken to be a line (losses are positive).
    """
    before: list[float | None] | None = None
    for row in curve:
        loss = row[4]
        if loss is not None and loss <= target:
            if before is None or before[4] is None:
                return {name: float(value or 0) for name, value in zip(CLOCKS, row, strict=False)}
            part = 1.0
            if 0 < loss < before[4]:
                part = (math.log(before[4]) - math.log(target)) / (math.log(before[4]) - math.log(loss))
            pairs = zip(CLOCKS, before, row, strict=False)
            return {name: float(old or 0) + part * (float(new or 0) - float(old or 0)) for name, old, new in pairs}
        before = row
    return None
