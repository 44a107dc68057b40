"""The tasks of the study. One registered function each: from a size and a folder to models, losses and data.

Importing this needs no torch: reports read labels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
        scales: by method, what the middles of the two axes of its grid are multiplied by.
        targets: training loss by preset, of a task that is not in ``thresholds.py``.
        make: called with a Size and ``data_dir``.
    """

    name: str
    label: str
    loss_label: str
    accuracy: bool
    scales: Mapping[str, tuple[float, float]]
    targets: Mapping[str, float]
    make: Callable[[Size, Path | None], Problem]


TASKS: dict[str, Task] = {}


Make = Callable[[Size, "Path | None"], Problem]


def task(
    label: str,
    loss_label: str = "cross-entropy",
    accuracy: bool = True,
    scales: Mapping[str, tuple[float, float]] | None = None,
    targets: Mapping[str, float] | None = None,
) -> Callable[[Make], Make]:
    """Register the decorated function, under its own name. It needs a target: here, or in ``thresholds.py``.

    Raises:
        ValueError: the name is taken.
    """

    def register(make: Make) -> Make:
        name = make.__name__
        if name in TASKS:
            raise ValueError(f"{name}: there is a task of this name already")
        TASKS[name] = Task(name, label, loss_label, accuracy, dict(scales or {}), dict(targets or {}), make)
        return make

    return register


@task("MLP")
def mlp(size: Size, data_dir: Path | None) -> Problem:
    """Three layers, tanh, on pictures of clothes."""
    import data
    from networks import multilayer
    from torch.nn.functional import cross_entropy

    training, validation = data.normalised(*data.read(*_arguments(size), data_dir))
    widths = (size.side**2, size.width, size.width // 2, 10)
    return Problem(lambda: multilayer(widths), cross_entropy, training, validation, data.name_of(data_dir))


@task("ResNet", scales={"sgd": (2, 1), "adamw": (2, 1)})
def resnet(size: Size, data_dir: Path | None) -> Problem:
    """Residual blocks with GroupNorm and SiLU, one a stage; two stages where pictures are small, else three."""
    import data
    from networks import ResNet
    from torch.nn.functional import cross_entropy

    training, validation = data.normalised(*data.read(*_arguments(size), data_dir))
    make = partial(ResNet, size.width, (1, 1) if size.side == 14 else (1, 1, 1), 2)
    return Problem(make, cross_entropy, training, validation, data.name_of(data_dir))


@task(
    "autoencoder",
    loss_label="summed cross-entropy of a picture",
    accuracy=False,
    scales={"sgd": (0.2, 3), "kfac": (0.25, 10)},
)
def autoencoder(size: Size, data_dir: Path | None) -> Problem:
    """Tanh around a linear code an eighth as wide, on digits where 5,000 of them are enough, else on clothes."""
    import data
    from networks import multilayer
    from torch.nn.functional import binary_cross_entropy_with_logits

    def loss(logits: Tensor, pixels: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, pixels, reduction="sum") / len(pixels)

    digits = size.training_examples + size.validation_examples <= 5000
    (training, _), (validation, _) = data.read(*_arguments(size), data_dir, digits)
    widths = (size.side**2, size.width, size.width // 2, size.width // 8, size.width // 2, size.width, size.side**2)
    return Problem(
        lambda: multilayer(widths, linear=(2,)),
        loss,
        (training, training.flatten(1)),
        (validation, validation.flatten(1)),
        data.name_of(data_dir, digits),
    )


def _arguments(size: Size) -> tuple[int, int, int]:
    return size.training_examples, size.validation_examples, size.side
