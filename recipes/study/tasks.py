"""The tasks of the study. One registered function each: from a size and a folder to models, losses and data.

Importing this needs no torch: reports read labels alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """How large a preset makes a task.

    Args:
        training_examples, validation_examples: of the data set.
        width: of the network; what it means is the task's business.
        side: of the pictures, 28 or 14 (means of 2 x 2 pixels).
    """

    training_examples: int
    validation_examples: int
    width: int
    side: int = 14


@dataclass(frozen=True)
class Problem:
    """A task at one size.

    Args:
        model: makes a network; torch's seed decides its weights.
        loss: mean over the examples, from outputs and targets.
        training, validation: inputs and targets, all of them in memory.
        data: name of the data set.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    data: str


@dataclass(frozen=True)
class Task:
    """
    Args:
        label: for people. loss_label: what the loss is.
        accuracy: whether it is a classification.
        scales: by method, what the middle of the first axis (lr, radius) is multiplied by.
        make: called with a Size and ``data_dir``.
    """

    name: str
    label: str
    loss_label: str
    accuracy: bool
    scales: Mapping[str, float]
    make: Callable[[Size, Path | None], Problem]


TASKS: dict[str, Task] = {}


def task(
    label: str, loss_label: str = "cross-entropy", accuracy: bool = True, scales: Mapping[str, float] | None = None
) -> Callable[[Callable[[Size, Path | None], Problem]], Callable[[Size, Path | None], Problem]]:
    """Register the decorated function, under its own name. It needs a target in ``thresholds.py`` too.

    Raises:
        ValueError: the name is taken.
    """

    def register(make: Callable[[Size, Path | None], Problem]) -> Callable[[Size, Path | None], Problem]:
        if make.__name__ in TASKS:
            raise ValueError(f"{make.__name__}: there is a task of this name already")
        TASKS[make.__name__] = Task(make.__name__, label, loss_label, accuracy, dict(scales or {}), make)
        return make

    return register


@task("MLP")
def mlp(size: Size, data_dir: Path | None) -> Problem:
    raise NotImplementedError


@task("small ResNet")
def resnet(size: Size, data_dir: Path | None) -> Problem:
    raise NotImplementedError


@task("autoencoder", loss_label="summed cross-entropy of a picture", accuracy=False)
def autoencoder(size: Size, data_dir: Path | None) -> Problem:
    raise NotImplementedError
