"""A checkpoint folder that any number of ranks writes and any other number reads; complete or not there at all."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver

from lightning_soo.checkpoint.distributed import (
    ManifestReader,
    ManifestWriter,
    PieceLoadPlanner,
    PieceSavePlanner,
    chunk_digest,
    overlapping,
)
from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.manifest import FILE, Manifest, file_digest, previous, unfinished
from lightning_soo.checkpoint.pieces import Piece
from lightning_soo.checkpoint.trees import merge

Folder = str | os.PathLike[str]


def local_path(folder: Folder) -> Path:
    """
    Raises:
        CheckpointError: a URL, which would be written to a folder of that name here.
    """
    if re.match(r"[A-Za-z][\w+.-]*://", os.fspath(folder)):
        raise CheckpointError(
            f"{os.fspath(folder)}: checkpoint folders are written to a disk that every rank sees, not to URLs; save to "
            "one and copy it from there"
        )
    return Path(folder)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one array or file of a checkpoint."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def save(
    folder: Folder,
    pieces: Sequence[Piece],
    content: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    distributed: bool = True,
    files: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint under another name, bring it to disk, and only then give it its name. Collective.

    One that is there already is kept until then, and is what is found if this is interrupted.

    Args:
        pieces: of this rank; those of all ranks make up every array once.
        content: plain data; where ranks know different things they are merged.
        group: the ranks that save; None is all of them.
        distributed: False is this process alone, whatever is initialised.
        files: called on the first rank with the unfinished folder, to write further files into it.

    Raises:
        CheckpointError: pieces that do not make up their arrays.
        torch.distributed.checkpoint.api.CheckpointException: a rank could not write; it says which, and why.
    """
    folder = Path(os.path.realpath(local_path(folder)))  # what a link names is replaced, not the link
    temporary = unfinished(folder)
    alone = not distributed or not dist.is_initialized() or dist.get_world_size(group) == 1

    def complete(manifest: Manifest) -> None:
        if files is not None:
            files(temporary)
        written = {
            path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "sha256": file_digest(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
            and path.name not in {chunk.file for array in manifest.arrays.values() for chunk in array.chunks}
        }
        replace(manifest, files={**manifest.files, **written}).write(temporary)
        for path in temporary.rglob("*"):
            _sync(path)
        _sync(temporary)
        give_name(temporary, folder)

    planner = PieceSavePlanner(pieces, content, merge)
    writer = ManifestWriter(temporary, planner, complete)
    if alone:  # without torch's warning that nothing is distributed
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
        (plan,) = writer.prepare_global_plan(plans)
        writer.finish(metadata, [writer.write_data(plan, planner).wait()])
        return
    state_dict_saver.save({}, storage_writer=writer, planner=planner, process_group=group)


def give_name(temporary: Path, folder: Path) -> None:
    """``temporary`` becomes ``folder``; what had this name goes when it has."""
    old = previous(folder)
    if folder.exists():
        _remove(old)
        os.replace(folder, old)
    os.replace(temporary, folder)
    _sync(folder.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:  # a checkpoint in one file had the name
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find(folder: Folder) -> Path:
    """The folder, or the one that was about to be replaced by it when saving was interrupted."""
    folder = local_path(folder)
    if not folder.exists() and (previous(folder) / FILE).is_file():
        return previous(folder)
    return folder


def newest_complete(parent: Folder) -> Path | None:
    """The checkpoint in a folder of checkpoints that was completed last, if any."""
    found = [path for path in local_path(parent).glob(f"*/{FILE}") if not path.parent.name.endswith(".unfinished")]
    newest = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest.parent if newest is not None else None


def is_store(folder: Folder) -> bool:
    """Whether this is, or was about to become, a checkpoint folder of ours."""
    return (find(folder) / FILE).is_file()


def verify(folder: Folder, manifest: Manifest, pieces: Iterable[Piece] | None = None) -> list[Problem]:
    """Compare sizes of all files, and the checksums of what the pieces need, or of everything. Local."""
    folder = Path(folder)
    problems = []
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(Problem(name, "the file is missing"))
        elif path.stat().st_size != expected["size"]:
            problems.append(Problem(name, f"has {path.stat().st_size} bytes of {expected['size']}"))
        elif pieces is None and "sha256" in expected and file_digest(path) != expected["sha256"]:
            problems.append(Problem(name, "its checksum differs"))
    broken = {problem.where for problem in problems}
    if pieces is None:
        wanted = {(key, chunk) for key, array in manifest.arrays.items() for chunk in array.chunks}
    else:
        wanted = {(piece.key, chunk) for piece in pieces for chunk in overlapping(manifest, piece)}
    for key, chunk in sorted(wanted, key=lambda one: (one[1].file, one[1].offset)):
        if chunk.file not in broken and chunk_digest(folder, chunk.file, chunk.offset, chunk.length) != chunk.sha256:
            problems.append(Problem(f"{chunk.file}, array {key!r}", "its checksum differs"))
    return problems


def check(folder: Folder, manifest: Manifest, pieces: Sequence[Piece]) -> None:
    """Before anything is read: is all that these pieces need there, and whole? Local.

    Raises:
        CheckpointError: names the file and the array.
    """
    problems = verify(folder, manifest, pieces)
    if problems:
        raise CheckpointError(
            f"{folder} is damaged: {problems[0]}"
            + f" (and {len(problems) - 1} more)" * (len(problems) > 1)
            + "; take an earlier checkpoint"
        )


def read(folder: Folder, manifest: Manifest, pieces: Sequence[Piece]) -> None:
    """Overwrite the pieces' tensors, in their own dtype and on their device. Local."""
    planner, reader = PieceLoadPlanner(pieces, manifest), ManifestReader(Path(folder), manifest)
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()
    planner.finish()


class BackgroundSaver:
    """Saves while training goes on: one checkpoint at a time, through a process group of its own.

    Collective to build and to use: every rank does the same.
    """

    def __init__(self, *, distributed: bool = True) -> None:
        together = distributed and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if together else None
        self._distributed = together
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._lock = threading.Lock()

    def save(self, folder: Folder, pieces: Sequence[Piece], content: Mapping[str, Any], **options: Any) -> None:
        """Wait for the last save, copy the pieces, and write these in the background.

        Raises:
            Exception: whatever the last save has met.
        """
        self.wait()
        local_path(folder)  # refused here and not when it is waited for
        copies = [replace(piece, tensor=piece.flat().to("cpu", copy=True)) for piece in pieces]
        options = {**options, "group": self._group, "distributed": self._distributed}
        self._under_way = self._thread.submit(save, folder, copies, deepcopy(content), **options)

    def wait(self) -> None:
        """Until what was begun is on disk.

        Raises:
            Exception: what it has met.
        """
        with self._lock:
            pending, self._under_way = self._under_way, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finish, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
