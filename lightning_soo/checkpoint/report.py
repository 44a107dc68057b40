"""What loading a checkpoint has taken, and what it has not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_soo.checkpoint.errors import CheckpointError

_SHOWN = 5


@dataclass
class LoadReport:
    """
    Attributes:
        taken: names of parameters that go on as they were saved, moments and preconditioners included.
        anew: what starts anew -> why.
        ignored: what the checkpoint has and nothing here takes -> why.
    """

    taken: list[str] = field(default_factory=list)
    anew: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return not self.anew and not self.ignored

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} parameters go on as they were saved"]
        for title, found in (("starts anew", self.anew), ("ignored", self.ignored)):
            rows = [f"{name}: {why}" for name, why in found.items()]
            lines += [f"{title}: {row}" for row in rows[:_SHOWN]]
            if len(rows) > _SHOWN:
                lines.append(f"{title}: and {len(rows) - _SHOWN} more")
        return "\n".join(lines)

    def add(self, other: LoadReport) -> None:
        """What another report says of other things."""
        self.taken += other.taken
        self.anew |= other.anew
        self.ignored |= other.ignored

    def refuse(self) -> None:
        """
        Raises:
            CheckpointError: not everything is taken.
        """
        if not self.is_complete:
            raise CheckpointError(
                f"the checkpoint does not fit:\n{self}\nLoad it with strict=False to go on with what fits"
            )


def compare_parameters(
    saved: Mapping[str, Sequence[int] | None], here: Mapping[str, tuple[int, ...]], report: LoadReport
) -> set[str]:
    """Names whose parameter is the same there and here; the rest goes into the report.

    Args:
        saved: shapes; None where an old checkpoint does not have them.
    """
    same = set()
    for name, shape in here.items():
        if name not in saved:
            report.anew[name] = "the checkpoint does not have this parameter"
            continue
        there = saved[name]
        if there is not None and tuple(there) != shape:
            report.anew[name] = f"its shape is {shape} here, {tuple(there)} in the checkpoint"
        else:
            same.add(name)
    return same


def compare_all(
    saved: Mapping[str, Sequence[int] | None], here: Mapping[str, tuple[int, ...]], report: LoadReport
) -> set[str]:
    """:func:`compare_parameters`, where what is not here is ignored."""
    same = compare_parameters(saved, here, report)
    for name in saved:
        if name not in here:
            report.ignored[name] = "no parameter of this name here"
    return same
