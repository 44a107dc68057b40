"""Real text that every Python installation has: the language reference of ``pydoc``, as bytes."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCABULARY = 128


class Windows(Dataset[Tensor]):
    """``count`` windows of ``length + 1`` characters, drawn once: the same on every rank.

    Args:
        part: ``"train"`` is the first nine tenths of the text, ``"validation"`` the rest.
    """

    def __init__(self, part: str, count: int, length: int) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
        codes = torch.tensor(list(text), dtype=torch.int64)
        cut = len(codes) * 9 // 10
        self.codes = codes[:cut] if part == "train" else codes[cut:]
        generator = torch.Generator().manual_seed(0 if part == "train" else 1)
        self.starts = torch.randint(0, len(self.codes) - length - 1, (count,), generator=generator).tolist()
        self.length = length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = self.starts[index]
        return self.codes[start : start + self.length + 1]
