"""In place of the package of this name: pairs of sentences without a network, for Accelerate's own test scripts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Rows = list[dict[str, Any]]
WORDS = [f"word{index}" for index in range(20)]


class DatasetDict(dict[str, Rows]):
    """What the scripts ask of one."""

    def map(self, function: Callable[[Any], Any], *, remove_columns: Sequence[str], **_: Any) -> DatasetDict:
        def mapped(row: dict[str, Any]) -> dict[str, Any]:
            columns = {name: values[0] for name, values in function({name: [row[name]] for name in row}).items()}
            return {name: value for name, value in {**row, **columns}.items() if name not in remove_columns}

        return DatasetDict({part: [mapped(row) for row in rows] for part, rows in self.items()})

    def rename_column(self, old: str, new: str) -> DatasetDict:
        return DatasetDict(
            {
                part: [{new if name == old else name: row[name] for name in row} for row in rows]
                for part, rows in self.items()
            }
        )


def load_dataset(*_: str) -> DatasetDict:
    """The second sentence repeats the first, or does not."""
    source = random.Random(0)

    def row(index: int) -> dict[str, Any]:
        first = " ".join(source.choices(WORDS, k=3))
        label = index % 2
        second = first if label else " ".join(source.choices(WORDS, k=3))
        return {"sentence1": first, "sentence2": second, "label": label, "idx": index}

    return DatasetDict({"train": [row(index) for index in range(192)], "validation": [row(i) for i in range(33)]})
