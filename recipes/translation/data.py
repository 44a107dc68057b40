"""Pairs of sentences: the King James and Reina-Valera Bibles (Debian's SWORD modules), or one sentence a line."""

from __future__ import annotations

import gzip
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SWORD = "SWORD_PATH"
MODULES = {"en": "engKJV2006eb", "es": "spaRV1909eb"}
PACKAGES = "sword-text-kjv sword-text-sparv"
# whole books, with few verses that another book repeats: Ruth, Esther, Ecclesiastes, Jonah; Galatians, James, 1 John
HELD_OUT = {"ot": (8, 17, 21, 32), "nt": (9, 20, 23)}
SPECIAL = ("<pad>", "<s>", "</s>")
PADDING, START, END = range(3)


class Lines(Sequence[str]):
    """A text by line number: a file is mapped, not read, so that it may be larger than memory; .gz is unpacked.

    Args:
        source: a file, or sentences.
    """

    def __init__(self, source: Path | Sequence[str]) -> None:
        self.origin, self.name = source, str(source) if isinstance(source, Path) else "sentences"
        if not isinstance(source, Path):
            self.data: bytes | mmap.mmap = "".join(f"{line}\n" for line in source).encode()
        elif source.suffix == ".gz":
            self.data = gzip.decompress(source.read_bytes())
        elif source.stat().st_size:
            with source.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            self.data = b""
        codes = np.frombuffer(self.data, np.uint8)
        starts = [np.zeros(1, np.int64)]
        for begin in range(0, len(codes), 1 << 26):
            starts.append(np.flatnonzero(codes[begin : begin + (1 << 26)] == ord("\n")) + begin + 1)
        self.starts = np.concatenate(starts)
        if self.starts[-1] < len(codes):  # no newline at the end
            self.starts = np.append(self.starts, len(codes) + 1)

    def __reduce__(self) -> Any:
        return Lines, (self.origin,)  # a loader's process maps the file itself

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, stop = self.starts[index], self.starts[index + 1]
        return self.data[start : stop - 1].decode("utf8", "replace").strip()

    @property
    def sizes(self) -> np.ndarray[Any, Any]:
        """Bytes of each line."""
        return np.diff(self.starts) - 1


class Pairs(Dataset[tuple[str, str]]):
    """Aligned lines, without empty and long ones.

    Args:
        longest: bytes of UTF-8 that a side may have; 0 for any.

    Raises:
        SystemExit: the sides differ in their number of lines, or nothing is left.
    """

    def __init__(self, source: Lines, target: Lines, longest: int = 0) -> None:
        if len(source) != len(target):
            raise SystemExit(
                f"{source.name} has {len(source)} lines, {target.name} {len(target)}: they are not aligned"
            )
        self.source, self.target = source, target
        least, most = np.minimum(source.sizes, target.sizes), np.maximum(source.sizes, target.sizes)
        self.kept = np.flatnonzero((least > 0) & (most <= (longest or most.max(initial=0))))
        if not len(self.kept):
            raise SystemExit(f"{source.name} and {target.name} have no pair of lines with at most {longest} bytes each")

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[str, str]:
        line = self.kept[index]
        return self.source[line], self.target[line]

    def spread(self, count: int) -> list[tuple[str, str]]:
        """At most ``count`` pairs, evenly spaced; all of them for 0."""
        count = min(count, len(self)) or len(self)
        return [self[i * len(self) // count] for i in range(count)]


def load(folder: Path | None, source: str, target: str, longest: int) -> tuple[Pairs, Pairs]:
    """Pairs for training and validation: of the folder, else of the Bible."""
    if folder is not None and sword_texts(folder) is None:
        train, held_out = (Pairs(*text_files(folder, part, source, target), longest) for part in ("train", "valid"))
        return train, held_out
    if source not in MODULES or target not in ("", *MODULES) or source == target:
        raise SystemExit(f"the Bible is there in {' and '.join(MODULES)}, not from {source!r} to {target!r}")
    parts = bible(folder)
    if source == "es":
        parts = [[(spanish, english) for english, spanish in part] for part in parts]
    train, held_out = (Pairs(*(Lines(side) for side in zip(*part, strict=True)), longest) for part in parts)
    return train, held_out


def text_files(folder: Path, part: str, source: str, target: str) -> tuple[Lines, Lines]:
    """``part.xx`` and ``part.yy``, each perhaps with ``.gz``.

    Args:
        target: "" for the language that is not the source.

    Raises:
        SystemExit: they are not there, or there are several.
    """
    files = {
        match[1]: path
        for path in sorted(folder.glob(f"{part}.*"))
        if (match := re.fullmatch(rf"{re.escape(part)}\.(\w+)(\.gz)?", path.name))
    }
    others = [target] if target else [name for name in files if name != source]
    if source not in files or len(others) != 1 or others[0] not in files:
        asked = f"{part}.{source} and {part}.{target or '(another language)'}"
        there = ", ".join(path.name for path in files.values()) or "none"
        raise SystemExit(f"{folder} should have {asked}, one sentence a line; found: {there}. See --source, --target")
    return Lines(files[source]), Lines(files[others[0]])


def sword_texts(folder: Path) -> Path | None:
    """The folder of the modules' texts in one where a package was unpacked, or in SWORD's own; None if not there."""
    for inner in ("usr/share/sword", "share/sword", "sword", "."):
        texts = folder / inner / "modules/texts/ztext"
        if all((texts / module).is_dir() for module in MODULES.values()):
            return texts
    return None


def bible(folder: Path | None = None) -> list[list[tuple[str, str]]]:
    """English and Spanish verses for training, and of the books held out.

    Args:
        folder: where to look, else the environment variable SWORD_PATH and /usr/share/sword.

    Raises:
        SystemExit: the modules are not there; says how to install them.
    """
    places = [folder] if folder else [*map(Path, filter(None, [os.environ.get(SWORD)])), Path("/usr/share/sword")]
    texts = next(filter(None, map(sword_texts, places)), None)
    if texts is None:
        raise SystemExit(
            f"no Bibles in {' or '.join(map(str, places))}: apt-get install {PACKAGES}; or, without being root, "
            f"apt-get download {PACKAGES}, dpkg-deb -x each .deb into a folder, and give it by --data-dir or {SWORD}. "
            "--data-dir may have train.en, train.es, valid.en and valid.es instead"
        )
    parts: list[list[tuple[str, str]]] = [[], []]
    english, spanish = (verses(texts / module) for module in MODULES.values())
    for (testament, book, one), (_, _, other) in zip(english, spanish, strict=True):
        if one and other:  # headings have their slots too, and a few verses are in one of them only
            parts[book in HELD_OUT[testament]].append((one, other))
    return parts


def verses(module: Path) -> Iterator[tuple[str, int, str]]:
    """Testament, number of the book in it, and text of every slot of a zText module, "" where it has none.

    ``.bzs`` is where each book lies in ``.bzz`` and how large it is, ``.bzv`` where each verse lies in its book.
    """
    for testament in ("ot", "nt"):
        places, slots, text = ((module / f"{testament}.bz{kind}").read_bytes() for kind in "svz")
        books = [zlib.decompress(text[start : start + size]) for start, size, _ in struct.iter_unpack("<III", places)]
        for book, start, size in struct.iter_unpack("<IIH", slots):
            marked = books[book][start : start + size].decode("utf8", "replace")
            plain = re.sub(r"(?s)<(note|title).*?</\1>|<[^>]+>", "", marked) if size else ""
            yield testament, book, " ".join(plain.replace("¶", "").split())


class Subwords:
    """Byte-pair encoding (Sennrich et al. 2016) of the bytes of both languages: nothing is unknown.

    Args:
        definition: what ``learn`` returns.

    Raises:
        SystemExit: the package tokenizers is not installed.
    """

    def __init__(self, definition: str) -> None:
        self.tokenizer = _tokenizers().Tokenizer.from_str(definition)

    @staticmethod
    def learn(sentences: Sequence[str], size: int) -> str:
        """The definition of a vocabulary of at most ``size`` tokens, as json."""
        package = _tokenizers()
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = package.decoders.ByteLevel()
        alphabet = package.pre_tokenizers.ByteLevel.alphabet()
        trainer = package.trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
        )
        tokenizer.train_from_iterator(iter(sentences), trainer)
        return str(tokenizer.to_str())

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, sentences: Sequence[str], length: int) -> list[list[int]]:
        """Tokens of each sentence with the end mark, cut to ``length``."""
        return [[*found.ids[: length - 1], END] for found in self.tokenizer.encode_batch_fast(list(sentences))]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text up to the first end mark."""
        end = tokens.index(END) if END in tokens else len(tokens)
        return str(self.tokenizer.decode(list(tokens[:end]))).strip()


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise SystemExit("the recipe needs the package tokenizers: pip install tokenizers") from None
    return tokenizers


class Collate:
    """Sentences to a source, a target behind the start mark, and the target itself; padded to the longest.

    Args:
        length: of the longest sequence; what is longer is cut.
        multiple: lengths are rounded up to multiples of this.
    """

    def __init__(self, subwords: Subwords, length: int, multiple: int = 8) -> None:
        self.subwords, self.length, self.multiple = subwords, length, multiple

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
        sources, targets = (self.subwords.encode(side, self.length) for side in zip(*pairs, strict=True))
        shifted = [[START, *tokens[:-1]] for tokens in targets]
        return self.pad(sources), self.pad(shifted), self.pad(targets)

    def pad(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, sequences))
        padded = torch.full((len(sequences), min(self.length, -(-longest // self.multiple) * self.multiple)), PADDING)
        for row, tokens in zip(padded, sequences, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return padded
