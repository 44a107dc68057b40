"""How a parameter is cut into preconditioned blocks. Depends on names, shapes and options alone, never on ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lightning_soo.checks import require_choice, require_whole_number

MERGE_DIMS = ("none", "kernel", "all")
_LARGEST_KERNEL = 64  # of a convolution in one dimension; what is larger is a matrix

# above the widths of models, below most vocabularies
_WIDEST = 16384


@dataclass(frozen=True, kw_only=True)
class BlockRules:
    """The options that decide a parameter's blocks; their meaning is in :class:`lightning_soo.Shampoo`."""

    max_preconditioner_dim: int = 1024
    max_factor_dim: int | None = None
    merge_dims: str = "kernel"
    precondition_1d: bool = False
    one_sided_above: int | None = None
    is_embedding: bool = False

    def check(self) -> None:
        """Raises:
        ValueError: a limit that is not a whole number of at least 1, or no way to merge dimensions.
        """
        require_whole_number("max_preconditioner_dim", self.max_preconditioner_dim, minimum=1)
        require_whole_number("max_factor_dim", self.max_factor_dim, minimum=1, optional=True)
        require_whole_number("one_sided_above", self.one_sided_above, minimum=1, optional=True)
        require_choice("merge_dims", self.merge_dims, MERGE_DIMS)

    @property
    def one_sided_limit(self) -> int:
        """Dimensions above this are left alone rather than cut into many blocks."""
        if self.one_sided_above is not None:
            return self.one_sided_above
        return max(_WIDEST, 8 * self.max_preconditioner_dim)


class ArrayLayout(NamedTuple):
    """One array of a block's statistics or roots; of a symmetric matrix half is sent."""

    shape: tuple[int, ...]
    symmetric: bool = False


@dataclass(frozen=True, kw_only=True)
class Block:
    """A box of a parameter's merged shape that is preconditioned on its own.

    Attributes:
        parameter: canonical name.
        merged_shape: the parameter's shape after ``merge_dims``.
        ranges: ``(start, stop)`` per merged dimension.
        dims: the dimensions that have a preconditioner (size above one, not above the one-sided limit).
        max_factor_dim: largest matrix of a preconditioner; None: as large as the block's side.
    """

    parameter: str
    merged_shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    dims: tuple[int, ...]
    max_factor_dim: int | None = None

    @property
    def key(self) -> str:
        """Name in the block store, the same whoever holds the block."""
        return f"{self.parameter}/" + "x".join(f"{start}:{stop}" for start, stop in self.ranges)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.ranges)

    @cached_property
    def diagonals(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each of ``dims`` the ranges, within the block, of the matrices along its preconditioner's diagonal.

        All of the block's other dimensions count for each of them: a side that is cut into blocks instead has a matrix
        for every pair of pieces, of which each sees less.
        """
        largest = math.inf if self.max_factor_dim is None else self.max_factor_dim
        return tuple(tuple(even_cuts(self.shape[dim], largest)) for dim in self.dims)

    @property
    def has_free_rows(self) -> bool:
        """Whether the first dimension alone has no matrix, being an embedding's or too long; the others do."""
        rows, *others = self.merged_shape
        return rows > 1 and self.dims == tuple(dim for dim, size in enumerate(others, 1) if size > 1)

    @property
    def has_several(self) -> bool:
        """Whether some dimension has more than one matrix."""
        return any(len(ranges) > 1 for ranges in self.diagonals)

    @property
    def orders(self) -> tuple[int, ...]:
        """Orders of the matrices, in the order of ``diagonals``."""
        return tuple(stop - start for ranges in self.diagonals for start, stop in ranges)

    @property
    def products_per_element(self) -> float:
        """By how many numbers an element is multiplied along all of ``dims``: the order where there is one matrix."""
        return sum(
            sum((stop - start) ** 2 for start, stop in ranges) / self.shape[dim]
            for dim, ranges in zip(self.dims, self.diagonals, strict=True)
        )

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.ranges)


def merge_shape(shape: tuple[int, ...], merge_dims: str, max_preconditioner_dim: int) -> tuple[int, ...]:
    """Shape after merging neighbouring dimensions (a reshape; elements keep their row-major order).

    ``"none"``: as it is. ``"kernel"``: of a convolution everything but the first dimension becomes one
    (``O x I*kh*kw``); a stack of matrices, as experts have, stays as it is.
    ``"all"``: dimensions of size one dropped, then merged from the right while the product is at most
    ``max_preconditioner_dim``.
    """
    require_choice("merge_dims", merge_dims, MERGE_DIMS)
    if merge_dims == "kernel" and len(shape) > 2 and max(shape[2:]) <= _LARGEST_KERNEL:
        return shape[0], math.prod(shape[1:])
    if merge_dims != "all":
        return shape
    merged: list[int] = []
    for size in reversed([size for size in shape if size != 1]):
        if merged and merged[0] * size <= max_preconditioner_dim:
            merged[0] *= size
        else:
            merged.insert(0, size)
    return tuple(merged) or (1,)


def even_cuts(size: int, limit: float) -> list[tuple[int, int]]:
    """Cut ``[0, size)`` into the fewest pieces of at most ``limit``, sizes equal up to one.

    Equal pieces rather than full ones and a remainder: 1025 at 1024 gives 513 + 512, not 1024 + 1.
    """
    pieces = max(1, math.ceil(size / limit))
    edges = [size * piece // pieces for piece in range(pieces + 1)]
    return list(itertools.pairwise(edges))


class Cuts(NamedTuple):
    """How a parameter is cut.

    Attributes:
        ranges: of every dimension of ``merged_shape``; blocks are all their combinations.
        dims: the dimensions that have preconditioners.
    """

    merged_shape: tuple[int, ...]
    ranges: tuple[list[tuple[int, int]], ...]
    dims: tuple[int, ...]

    def divided_at(self, position: int) -> bool:
        """Whether some block has elements on both sides of a row-major position."""
        shape, ranges = self.merged_shape, self.ranges
        while True:
            row, position = divmod(position, math.prod(shape[1:]))
            start, stop = next(cut for cut in ranges[0] if row < cut[1])
            if position == 0:
                return row != start
            if stop - start > 1:
                return True
            shape, ranges = shape[1:], ranges[1:]  # inside one row that is cut off by itself


def cut(shape: tuple[int, ...], rules: BlockRules) -> tuple[Cuts | None, str]:
    """How a parameter is cut into blocks, or None and the reason in words why it is not."""
    if math.prod(shape) == 0:
        return None, "empty"
    merged = merge_shape(shape, rules.merge_dims, rules.max_preconditioner_dim)
    real = [dim for dim, size in enumerate(merged) if size > 1]
    if not real:
        return None, "one element"
    if len(real) == 1 and not rules.precondition_1d:
        return None, "1-D (precondition_1d=False)"
    # the rows of an embedding are categories: no correlation worth a matrix, and most rows of its gradient are zero
    skip_rows = rules.is_embedding and len(real) > 1 and merged[0] > merged[real[-1]]
    dims = tuple(d for d in real if merged[d] <= rules.one_sided_limit and not (skip_rows and d == 0))
    if not dims:
        return None, f"every dimension above one_sided_above={rules.one_sided_limit}"
    ranges = tuple(
        even_cuts(size, rules.max_preconditioner_dim) if dim in dims else [(0, size)] for dim, size in enumerate(merged)
    )
    return Cuts(merged, ranges, dims), ""


def partition(name: str, shape: tuple[int, ...], rules: BlockRules) -> tuple[list[Block], str]:
    """Return the blocks of one parameter, or no blocks and the reason in words."""
    cuts, reason = cut(shape, rules)
    if cuts is None:
        return [], reason
    return [
        Block(
            parameter=name,
            merged_shape=cuts.merged_shape,
            ranges=ranges,
            dims=cuts.dims,
            max_factor_dim=rules.max_factor_dim,
        )
        for ranges in itertools.product(*cuts.ranges)
    ], ""
