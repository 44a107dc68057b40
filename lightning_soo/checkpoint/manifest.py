"""A checkpoint folder's table of contents, as json: arrays, where their elements lie, checksums, all that is small."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lightning_soo._version import __version__
from lightning_soo.checkpoint.errors import CheckpointError

FORMAT = 2
"""Written by this version. 1 had no folders of its own: one dictionary, in one file."""
FILE = "manifest.json"


@dataclass(frozen=True)
class Chunk:
    """Elements ``[start, stop)`` of an array: bytes ``[offset, offset + length)`` of a file."""

    start: int
    stop: int
    file: str
    offset: int
    length: int
    sha256: str


@dataclass(frozen=True)
class Array:
    """One array and its chunks, in order and without a gap."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"dtype {self.dtype!r} is unknown to torch {torch.__version__}")
        return found


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """
    Attributes:
        content: what is no array: plain data, the same whoever wrote it.
        world_size: ranks that wrote it, for information.
        files: name -> size and checksum of every file.
    """

    arrays: Mapping[str, Array]
    content: Mapping[str, Any]
    world_size: int
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format: int = FORMAT
    version: str = __version__

    def write(self, folder: Path) -> None:
        """To disk, and on it when this returns."""
        body = {
            "format": self.format,
            "version": self.version,
            "world_size": self.world_size,
            "content": self.content,
            "arrays": {key: asdict(array) for key, array in self.arrays.items()},
            "files": self.files,
        }
        text = json.dumps(body, separators=(",", ":"))
        with (folder / FILE).open("w", encoding="utf-8") as file:
            file.write(json.dumps({"sha256": digest(text.encode()), "manifest": text}))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Manifest:
        """
        Raises:
            CheckpointError: no manifest, a damaged one, or one of a newer version.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            what = "no such folder" if not path.parent.is_dir() else f"it has no {FILE}"
            raise CheckpointError(
                f"{path.parent} is no complete checkpoint: {what}"
                + (" (saving was interrupted)" if unfinished(path.parent).exists() else "")
            )
        try:
            outer = json.loads(path.read_text("utf-8"))
            text, found = outer["manifest"], outer["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): take an earlier checkpoint") from None
        if digest(text.encode()) != found:
            raise CheckpointError(f"{path} is damaged: its checksum differs; take an earlier checkpoint")
        body = json.loads(text)
        if body["format"] > FORMAT:
            raise CheckpointError(
                f"{path.parent} has format {body['format']}, written by lightning_soo {body['version']}; this version "
                f"({__version__}) reads up to {FORMAT}: update it"
            )
        arrays = {
            key: Array(tuple(row["shape"]), row["dtype"], tuple(Chunk(**chunk) for chunk in row["chunks"]))
            for key, row in body["arrays"].items()
        }
        return cls(**{**body, "arrays": arrays})

    def digest(self) -> str:
        """The same on every rank that has read the same checkpoint."""
        keys = [(key, array.shape, [chunk.sha256 for chunk in array.chunks]) for key, array in self.arrays.items()]
        return digest(json.dumps([keys, self.content], default=str).encode())


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return folder.with_name(f"{folder.name}.unfinished")


def previous(folder: Path) -> Path:
    """Where the one that is being replaced waits until the new one is complete."""
    return folder.with_name(f"{folder.name}.previous")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def join(chunks: Iterable[Chunk], key: str, numel: int) -> tuple[Chunk, ...]:
    """Chunks in order.

    Raises:
        CheckpointError: they leave elements out, or have some twice.
    """
    ordered = sorted(chunks, key=lambda chunk: chunk.start)
    position = 0
    for chunk in ordered:
        if chunk.start != position:
            raise CheckpointError(f"array {key!r}: elements from {min(chunk.start, position)} on are given wrongly")
        position = chunk.stop
    if position != numel:
        raise CheckpointError(f"array {key!r}: ranks gave {position} of its {numel} elements")
    return tuple(ordered)
