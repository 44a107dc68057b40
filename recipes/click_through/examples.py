"""Examples that are read a batch at a time, from memory or from mapped files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Examples(Dataset[Batch]):
    """Examples drawn in lots of consecutive ones; an index is that of a lot.

    Args:
        read: dense features, table rows and labels of some examples.
        count: of examples.
        lot: examples that an index stands for; what is left over at the end is not used.
    """

    read: Callable[[np.ndarray], Batch]
    count: int
    lot: int = 1

    def __len__(self) -> int:
        return self.count // self.lot

    def __getitems__(self, lots: Sequence[int]) -> Batch:
        """The whole batch at once: one example at a time would cost more than the training step."""
        rows = np.asarray(lots, np.int64)[:, None] * self.lot + np.arange(self.lot)
        return self.read(rows.ravel())

    def whole_batches(self, batch: int, most: int = 0) -> Examples:
        """Without the last examples that do not fill a batch: nothing is counted twice, whatever the processes.

        Args:
            most: of the first examples, if not 0.

        Raises:
            SystemExit: there is not one batch.
        """
        count = min(self.count, most or self.count) // batch * batch
        if not count:
            raise SystemExit(f"{self.count} held-out examples do not fill one batch of {batch}")
        return replace(self, count=count)


def as_it_is(batch: Batch) -> Batch:
    """For ``collate_fn``: ``Examples`` gives whole batches."""
    return batch


@dataclass(frozen=True)
class Data:
    """Args: table_rows: of each categorical feature."""

    training: Examples
    held_out: Examples
    dense_features: int
    table_rows: tuple[int, ...]
