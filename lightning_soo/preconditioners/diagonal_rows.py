"""The diagonal preconditioner of rows that have no matrix: of an embedding's vocabulary, of a large head.

As Shampoo's second side (Gupta et al. 2018, algorithm 1, with ``L`` diagonal): the direction's row ``i`` is multiplied
by ``(L_i + eps^2)^(-1/p)``, where ``L_i`` is the mean of the graft's second moments over the row and ``p`` that of the
other sides' roots. The moments are of every step and lie beside the parameter, so that nothing is kept for it, and
nothing sent but the sums of rows that sharding cuts (FSDP1, ZeRO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soo.placement.fragments import Fragment


@dataclass(frozen=True, kw_only=True)
class DiagonalRows:
    """The rows of one parameter, and which of them this rank's fragment holds.

    Attributes:
        columns: elements of a row.
        cut: rows of which no rank holds all; the same on every rank.
        whole: positions ``(start, stop)``, among the rank's elements, of those rows that it holds completely.
        parts: the rows that it holds a part of, with the part's positions; at most two.
    """

    columns: int
    cut: tuple[int, ...]
    whole: tuple[int, int]
    parts: tuple[tuple[int, tuple[int, int]], ...]

    @classmethod
    def of(cls, fragment: Fragment, columns: int, cut: Sequence[int]) -> DiagonalRows:
        """Args: cut: as :meth:`FragmentTable.cut_rows` gives them."""
        start, stop = fragment.start, fragment.stop
        first, last = -(-start // columns) * columns, stop // columns * columns
        if first > last:  # inside one row
            parts = [(start, stop)]
            first = last = start
        else:
            parts = [(start, first), (last, stop)]
        return cls(
            columns=columns,
            cut=tuple(cut),
            whole=(first - start, last - start),
            parts=tuple((low // columns, (low - start, high - start)) for low, high in parts if low < high),
        )

    def cut_sums(self, moments: Tensor, counts: bool) -> Tensor:
        """What this rank adds to the sums of the cut rows.

        Args:
            moments: second moments of the rank's elements.
            counts: whether it adds anything; one copy of the model does.

        Returns:
            float64, as long as ``cut``.
        """
        sums = torch.zeros(len(self.cut), dtype=torch.float64, device=moments.device)
        if counts:
            flat = moments.reshape(-1)
            for row, (start, stop) in self.parts:
                sums[self.cut.index(row)] = flat[start:stop].sum(dtype=torch.float64)
        return sums

    def scale_(
        self, direction: Tensor, moments: Tensor, cut_sums: Sequence[float], *, exponent: float, eps: float
    ) -> None:
        """Multiply the rank's elements of the direction by their rows' scales, in place.

        Args:
            direction, moments: contiguous, laid out alike.
            cut_sums: of the cut rows, over all ranks.
            exponent: ``p``.
            eps: of the graft, below which it does not tell second moments apart either.
        """
        flat, second = direction.view(-1), moments.view(-1)
        start, stop = self.whole
        wide = torch.promote_types(second.dtype, torch.float32)
        if start < stop:
            means = second[start:stop].view(-1, self.columns).mean(1, dtype=wide)
            flat[start:stop].view(-1, self.columns).mul_(means.add_(eps * eps).pow_(-1.0 / exponent).unsqueeze(1))
        for row, (start, stop) in self.parts:
            mean = cut_sums[self.cut.index(row)] / self.columns
            flat[start:stop].mul_((mean + eps * eps) ** (-1.0 / exponent))
