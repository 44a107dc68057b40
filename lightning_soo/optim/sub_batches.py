"""Micro-batches and random parts of a batch, whatever its structure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


def batch_size(batch: Any) -> int:
    """Examples in a batch: the first dimension that all its tensors have.

    Raises:
        ValueError: no tensor, or tensors that disagree.
    """
    sizes: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.ndim:
            sizes.add(tensor.shape[0])
        return tensor

    _map(batch, note)
    if len(sizes) != 1:
        what = f"tensors whose first dimensions are {sorted(sizes)}" if sizes else f"no tensor ({type(batch).__name__})"
        raise ValueError(
            f"a batch with {what} cannot be divided: examples have to be the first dimension of every tensor. Give "
            "closures for the micro-batches instead, and a hessian_closure"
        )
    return sizes.pop()


def take(batch: Any, examples: slice | Sequence[int]) -> Any:
    """Some examples of a batch, in the batch's own structure."""
    if isinstance(examples, slice):
        return _map(batch, lambda tensor: tensor[examples] if tensor.ndim else tensor)

    def select(tensor: Tensor) -> Tensor:
        return tensor[torch.as_tensor(examples, device=tensor.device)] if tensor.ndim else tensor

    return _map(batch, select)


def parts(size: int, count: int) -> list[slice]:
    """``count`` consecutive parts, as equal as can be.

    Raises:
        ValueError: fewer examples than parts.
    """
    if not 1 <= count <= size:
        raise ValueError(f"micro_batches={count}: must be between 1 and the {size} examples of the batch")
    edges = [index * size // count for index in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def closures(loss_of: Callable[[Any], Any], batch: Any, count: int) -> list[tuple[Callable[[], Any], float]]:
    """A batch's loss in ``count`` parts: a closure for each, and its number of examples.

    Raises:
        ValueError: a batch that cannot be divided, or fewer examples than parts.
    """
    sections = parts(batch_size(batch), count)
    pieces = [take(batch, section) for section in sections] if count > 1 else [batch]
    return [
        (partial(loss_of, piece), float(section.stop - section.start))
        for piece, section in zip(pieces, sections, strict=True)
    ]


def one_of_each_stratum(size: int, fraction: float, *, seed: int, step: int, rank: int) -> list[int]:
    """A random part of ``size`` things: one of every ``1 / fraction`` consecutive ones.

    Where ranks have consecutive parts of one batch, the same things are taken whatever their number, and each rank
    takes its share; a plain random choice would do neither.
    """
    count = max(1, round(size * fraction))
    edges = [index * size // count for index in range(count + 1)]
    draws = np.random.default_rng([seed, step]).random((rank + 1) * count)[rank * count :]
    return [
        start + math.floor(draw * (stop - start))
        for draw, (start, stop) in zip(draws.tolist(), pairwise(edges), strict=True)
    ]


def _map(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        kind = type(batch)
        return kind({key: _map(value, change) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, change) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_map(value, change) for value in batch)
    return batch
