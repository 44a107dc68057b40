"""Memory that the trainer and its worker processes share: arrays are written once and read in place."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_ALIGNMENT = 64
_SMALLEST = 1 << 20


class Arena:
    """An anonymous file that grows; it has no name, so nothing is left behind however the processes end.

    Attributes:
        descriptor: of the file, to be passed to a child.
        size: bytes now; a child maps this much.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("lightning_soo", os.MFD_CLOEXEC)
        self.size = 0
        self._map: mmap.mmap | None = None
        self._free: list[tuple[int, int]] = []  # (offset, bytes), sorted, never adjacent
        self._taken: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        """Offset of a new region: the first gap that is large enough, or new memory at the end."""
        size = max(_ALIGNMENT, -(-size // _ALIGNMENT) * _ALIGNMENT)
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[index : index + 1] = [(offset + size, room - size)] if room > size else []
                self._taken[offset] = size
                return offset
        self._grow(size)
        return self.allocate(size)

    def release(self, offset: int) -> None:
        """Give a region back."""
        self._insert(offset, self._taken.pop(offset))

    def array(self, offset: int, shape: Sequence[int], dtype: str | np.dtype[Any]) -> npt.NDArray[Any]:
        """The memory itself as an array; valid after growth, too, since old mappings see the same pages."""
        assert self._map is not None
        return np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)

    def close(self) -> None:
        """Close the file; arrays given out stay valid until they are dropped."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self._map = None

    def _grow(self, size: int) -> None:
        start = self.size
        self.size = max(_SMALLEST, 2 * start, start + size)
        os.ftruncate(self.descriptor, self.size)  # pages cost memory only once they are written
        self._map = mmap.mmap(self.descriptor, self.size)
        self._insert(start, self.size - start)

    def _insert(self, offset: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, (offset, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        self._free = merged
