"""Parts of named arrays: what one rank gives to a checkpoint, or wants of it. Whoever holds what has no name here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive elements of an array in row-major order; all of them, mostly.

    Attributes:
        key: name of the array.
        shape: of the whole array.
        start: of the first element.
        tensor: the elements: to be written, or to be overwritten.
    """

    key: str
    shape: tuple[int, ...]
    tensor: Tensor
    start: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()

    @property
    def numel(self) -> int:
        """Elements of the whole array."""
        return math.prod(self.shape)

    def flat(self) -> Tensor:
        """The elements in row-major order: a view where there is one, else a copy."""
        return self.tensor.detach().reshape(-1)


@dataclass(frozen=True)
class Wanted:
    """What is taken from a checkpoint.

    Attributes:
        pieces: to be filled.
        install: called when they are, on every rank.
    """

    pieces: list[Piece]
    install: Callable[[], None]


def whole(key: str, tensor: Tensor) -> Piece:
    """A piece that is all of its array."""
    return Piece(key=key, shape=tuple(tensor.shape), tensor=tensor)
