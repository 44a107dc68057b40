"""How large the study is: sizes, batch sizes, budgets, grids and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tasks import Size


@dataclass(frozen=True)
class TaskPreset:
    """
    Args:
        base_epochs: budget at the smallest batch size.
        batch_sizes: powers of two, ascending; the first is B0.
    """

    size: Size
    base_epochs: int
    batch_sizes: tuple[int, ...]

    def epochs(self, batch_size: int) -> float:
        """``(log2(B / B0) + 1)`` times the base: larger batches may see more samples, as in Ma et al. (2019)."""
        return (math.log2(batch_size / self.batch_sizes[0]) + 1) * self.base_epochs

    def steps(self, batch_size: int) -> int:
        """Of the whole budget; an epoch leaves out what does not fill a batch."""
        return round(self.epochs(batch_size) * (self.size.training_examples // batch_size))


@dataclass(frozen=True)
class Preset:
    """
    Args:
        tasks: by name; a registered task that is not named takes `other`.
        grid: values on the two axes of every method: of the step's size, and of the other.
        seeds: of a tuned point; the first is that of the grid.
        evaluations: of a run, about.
        evaluation_examples: of the training set, for the training loss.
        landscape_points, landscape_examples: on each side of the plane, and in its loss.
    """

    tasks: Mapping[str, TaskPreset]
    other: TaskPreset
    grid: tuple[int, int]
    seeds: tuple[int, ...]
    evaluations: int = 30
    evaluation_examples: int = 2048
    landscape_points: int = 15
    landscape_examples: int = 1024

    @property
    def points(self) -> int:
        """Of a grid."""
        return self.grid[0] * self.grid[1]

    def task(self, name: str) -> TaskPreset:
        return self.tasks.get(name, self.other)


def _powers(first: int, last: int, step: int = 1) -> tuple[int, ...]:
    return tuple(2**exponent for exponent in range(first, last + 1, step))


_TINY = Size(512, 256, 16)
_SMALL = Size(4096, 904, 64)
_FULL = Size(49152, 8192, 256, side=28)  # six times 8,192; with validation nearly all 60,000

PRESETS = {
    "smoke": Preset(
        tasks={
            "mlp": TaskPreset(_TINY, 2, (128, 512)),
            "resnet": TaskPreset(Size(256, 128, 4), 1, (128, 256)),
            "autoencoder": TaskPreset(_TINY, 2, (128, 512)),
        },
        other=TaskPreset(Size(256, 128, 4), 1, (128, 256)),
        grid=(2, 2),
        seeds=(0, 1),
        evaluations=4,
        evaluation_examples=256,
        landscape_points=3,
        landscape_examples=256,
    ),
    "small": Preset(
        tasks={
            "mlp": TaskPreset(_SMALL, 10, _powers(6, 12, 2)),
            "resnet": TaskPreset(Size(4096, 904, 8), 5, _powers(6, 12, 2)),
            "autoencoder": TaskPreset(Size(4096, 904, 128), 10, _powers(6, 12, 2)),
        },
        other=TaskPreset(_SMALL, 6, _powers(6, 12, 2)),
        grid=(5, 3),
        seeds=(0, 1, 2),
    ),
    "full": Preset(
        tasks={
            "mlp": TaskPreset(_FULL, 10, _powers(5, 13)),
            "resnet": TaskPreset(Size(49152, 8192, 16, side=28), 5, _powers(5, 13)),
            "autoencoder": TaskPreset(_FULL, 10, _powers(5, 13)),
        },
        other=TaskPreset(_FULL, 10, _powers(5, 13)),
        grid=(5, 5),
        seeds=(0, 1, 2, 3, 4),
        evaluations=60,
        landscape_points=25,
        landscape_examples=2048,
    ),
}
