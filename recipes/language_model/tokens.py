"""Text to numbers: characters, or sub-words by the package tokenizers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

CHARACTERS = 255


class Characters:
    """The most frequent characters of a text; others are one token, the last.

    Attributes:
        size: number of tokens, at most 256.
    """

    def __init__(self, text: str) -> None:
        counts = Counter(text)
        self.alphabet = "".join(sorted(sorted(counts, key=lambda one: (-counts[one], one))[:CHARACTERS]))
        self.size = len(self.alphabet) + 1

    def encode(self, text: str) -> np.ndarray:
        """One number for each character."""
        table = {ord(character): index for index, character in enumerate(self.alphabet)}
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        found, where = np.unique(points, return_inverse=True)
        return np.array([table.get(int(point), self.size - 1) for point in found], np.int64)[where]


class Subwords:
    """A byte-pair encoding trained on a text, or read from a ``tokenizer.json``.

    Args:
        size: tokens wanted of a trained one; a short text gives fewer, and ``size`` then says how many.

    Raises:
        SystemExit: the package tokenizers is missing.
    """

    def __init__(self, text: str, size: int, path: Path | None = None) -> None:
        try:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        except ImportError:
            raise SystemExit("--subwords needs a package: pip install tokenizers") from None
        if path is not None:
            self.tokenizer = Tokenizer.from_file(str(path))
        else:
            self.tokenizer = Tokenizer(models.BPE())
            self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            self.tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
            )
            self.tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
        self.size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Line by line, so that no line's tokens depend on another."""
        lines = self.tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
        return np.concatenate([np.zeros(0, np.int64), *(np.array(line.ids, np.int64) for line in lines)])
