"""Criteo's click logs: text converted once, then memory-mapped.

python criteo.py FOLDER --processes 8    # one process a file; train.py maps the results, 160 bytes an example
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
from collections.abc import Iterable
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from examples import Batch, Data, Examples

INTEGERS, CATEGORIES = 13, 26
COLUMNS = 1 + INTEGERS + CATEGORIES
CONVERTED = ".int32"


def criteo(folder: Path, table_rows: int, lot: int) -> Data:
    """The logs that ``convert`` has left in a folder, memory-mapped.

    The last of several days is held out, of a single file the last seventh (train.txt is seven days in order).

    Raises:
        SystemExit: nothing is there, or a file is not yet converted.
    """
    texts = texts_of(folder)
    converted = [folder / (_stem(text) + CONVERTED) for text in texts] or sorted(folder.glob("*" + CONVERTED), key=_day)
    missing = [path.name for path in converted if not path.is_file()]
    if missing:
        raise SystemExit(f"{', '.join(missing)} missing: run python {Path(__file__).name} {folder} once")
    if not converted:
        raise SystemExit(f"{folder} has neither train.txt nor day_0, day_1, ... (.gz)")
    arrays = [np.memmap(path, np.int32, "r").reshape(-1, COLUMNS) for path in converted]
    if len(arrays) == 1:
        cut = len(arrays[0]) * 6 // 7
        training, held_out = [arrays[0][:cut]], [arrays[0][cut:]]
    else:
        training, held_out = arrays[:-1], arrays[-1:]

    def examples(parts: list[np.ndarray]) -> Examples:
        ends = np.cumsum([len(part) for part in parts])

        def read(rows: np.ndarray) -> Batch:
            raw = np.empty((len(rows), COLUMNS), np.int32)
            owner = np.searchsorted(ends, rows, side="right")
            for index in np.unique(owner):
                mine = owner == index
                raw[mine] = parts[index][rows[mine] - (ends[index] - len(parts[index]))]
            return batch_of(raw, table_rows)

        return Examples(read, int(ends[-1]), lot)

    sizes = (table_rows,) * CATEGORIES
    return Data(examples(training), examples(held_out), INTEGERS, sizes)


def batch_of(raw: np.ndarray, table_rows: int) -> Batch:
    """log(x + 1) of the integers, negative ones as 0; a category's 32 bits modulo the rows of a table."""
    integers = raw[:, 1 : 1 + INTEGERS].clip(min=0)
    hashes = np.ascontiguousarray(raw[:, 1 + INTEGERS :]).view(np.uint32)
    return (
        torch.from_numpy(np.log1p(integers, dtype=np.float32)),
        torch.from_numpy(hashes.astype(np.int64) % table_rows),
        torch.from_numpy(raw[:, 0].astype(np.float32)),
    )


def texts_of(folder: Path) -> list[Path]:
    """train.txt or day_0, day_1, ... in order, compressed or not."""
    days = [p for p in folder.iterdir() if re.fullmatch(r"day_\d+(\.gz)?", p.name)]
    days = list({_stem(path): path for path in sorted(days)}.values())  # where both are there, one of them
    return sorted(days, key=_day) or [p for n in ("train.txt", "train.txt.gz") if (p := folder / n).is_file()][:1]


def _stem(path: Path) -> str:
    return path.name.removesuffix(CONVERTED).removesuffix(".gz")


def _day(path: Path) -> tuple[int, str]:
    digits = re.search(r"\d+", path.name)
    return (int(digits[0]) if digits else 0, path.name)


def parse(lines: Iterable[bytes]) -> np.ndarray:
    """Rows of label, 13 integers and the 32 bits of 26 categories; a missing value is 0, as in the authors' code.

    Raises:
        ValueError: a line with another number of fields, or a field that is no number.
    """
    rows = []
    for line in lines:
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != COLUMNS:
            raise ValueError(f"{len(fields)} fields where {COLUMNS} are expected: {line[:60]!r}")
        numbers = [int(field or b"0") for field in fields[: 1 + INTEGERS]]
        rows.append(numbers + [int(field or b"0", 16) for field in fields[1 + INTEGERS :]])
    table = np.array(rows, np.int64).reshape(-1, COLUMNS)
    table[:, 1 : 1 + INTEGERS] = table[:, 1 : 1 + INTEGERS].clip(-(2**31), 2**31 - 1)
    return table.astype(np.uint32).view(np.int32)


def convert(text: Path, lines_at_once: int = 100_000) -> int:
    """Write ``parse(text)`` beside it, if it is not there; it appears when it is whole. Returns the rows it has."""
    path = text.with_name(_stem(text) + CONVERTED)
    if not path.exists():
        part = path.with_name(path.name + ".part")
        with gzip.open(text) if text.suffix == ".gz" else text.open("rb") as source, part.open("wb") as target:
            while lines := list(islice(source, lines_at_once)):
                parse(lines).tofile(target)
        os.replace(part, path)
    return path.stat().st_size // (4 * COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="files at the same time")
    given = parser.parse_args()
    texts = texts_of(given.folder)
    if not texts:
        raise SystemExit(f"{given.folder} has neither train.txt nor day_0, day_1, ... (.gz)")
    with Pool(given.processes) as pool:
        for text, rows in zip(texts, pool.imap(convert, texts), strict=True):
            print(f"{text.name}: {rows:,} examples", flush=True)


if __name__ == "__main__":
    main()
