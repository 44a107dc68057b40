"""Pieces to and from files by torch.distributed.checkpoint.

Each array is one-dimensional there and each piece a range of it, which its planners are told; so any rank reads any
range, whoever wrote it. Its ``.metadata`` is a pickle, for plain torch to read the folder with; ours is the manifest,
and nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.manifest import Array, Chunk, Manifest, digest, dtype_name, join
from lightning_soo.checkpoint.pieces import Piece


@dataclasses.dataclass(frozen=True)
class _HashedResult(WriteResult):
    sha256: str = ""


class PieceSavePlanner(SavePlanner):
    """Writes this rank's pieces.

    Args:
        pieces: of this rank; those of all ranks make up every array once.
        content: plain data of this rank.
        merge: from the contents of all ranks to that of the checkpoint; called on the coordinator.
    """

    def __init__(
        self, pieces: Sequence[Piece], content: Any, merge: Callable[[Sequence[Any]], Mapping[str, Any]]
    ) -> None:
        self._pieces = {(piece.key, piece.start): piece for piece in pieces}
        self._content, self._merge = content, merge
        self.merged: Mapping[str, Any] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.world_size = 1

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: the pieces are known."""

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(piece.key, torch.Size([piece.start])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size([piece.start]), torch.Size([piece.tensor.numel()])),
                    properties=TensorProperties(dtype=piece.tensor.dtype),
                    size=torch.Size([piece.numel]),
                ),
            )
            for piece in self._pieces.values()
            if piece.tensor.numel()
        ]
        shapes = {piece.key: (piece.shape, piece.tensor.dtype) for piece in self._pieces.values()}
        return SavePlan(items, planner_data=(shapes, self._content))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.world_size = len(all_plans)
        for plan in all_plans:
            self.shapes |= plan.planner_data[0]
            for item in plan.items:
                data = item.tensor_data
                assert data is not None
                known = found.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
                assert isinstance(known, TensorStorageMetadata)
                known.chunks.append(data.chunk)
        self.merged = self._merge([plan.planner_data[1] for plan in all_plans])
        bare = [dataclasses.replace(plan, planner_data=None) for plan in all_plans]
        return bare, Metadata(state_dict_metadata=found)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._pieces[write_item.index.fqn, _first(write_item.index)].flat()


class ManifestWriter(FileSystemWriter):
    """Writes files with their checksums, and at last the manifest.

    Args:
        complete: called on the coordinator when everything is on disk.
    """

    def __init__(self, folder: Path, planner: PieceSavePlanner, complete: Callable[[Manifest], None]) -> None:
        super().__init__(folder)
        self._folder, self._planner, self._complete = folder, planner, complete

    # what fails in these two is raised on every rank: nobody waits for one whose disk is full

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self._folder.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        for path in self._folder.iterdir():  # of a save that was interrupted
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        found: list[SavePlan] = super().prepare_global_plan(plans)
        return found

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = super().write_data(plan, planner).wait()
        done: Future[list[WriteResult]] = Future()
        # read again from where they were written: a checksum of what is there, not of what was meant
        done.set_result([self._hashed(result) for result in results])
        return done

    def _hashed(self, result: WriteResult) -> WriteResult:
        place = result.storage_data
        found = chunk_digest(self._folder, place.relative_path, place.offset, place.length)
        given = {entry.name: getattr(result, entry.name) for entry in dataclasses.fields(result)}
        return _HashedResult(**given, sha256=found)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        chunks: dict[str, list[Chunk]] = {}
        for result in (result for of_rank in results for result in of_rank):
            assert isinstance(result, _HashedResult)
            start, place = _first(result.index), result.storage_data
            written = metadata.state_dict_metadata[result.index.fqn]
            assert isinstance(written, TensorStorageMetadata)
            size = next(chunk.sizes[0] for chunk in written.chunks if chunk.offsets[0] == start)
            chunks.setdefault(result.index.fqn, []).append(
                Chunk(start, start + size, place.relative_path, place.offset, place.length, result.sha256)
            )
        arrays = {}
        for key, (shape, dtype) in self._planner.shapes.items():
            numel = torch.Size(shape).numel()
            arrays[key] = Array(shape, dtype_name(dtype), join(chunks.get(key, ()), key, numel))
        sizes = {path.name: {"size": path.stat().st_size} for path in sorted(self._folder.iterdir())}
        elsewhere = {chunk.file for array in arrays.values() for chunk in array.chunks} - set(sizes)
        if elsewhere:
            raise CheckpointError(
                f"{self._folder} has no {min(elsewhere)}, which another rank has written: all ranks have to save to "
                "the same folder, on a disk that all machines share"
            )
        manifest = Manifest(
            arrays=arrays, content=self._planner.merged, world_size=self._planner.world_size, files=sizes
        )
        self._complete(manifest)


class PieceLoadPlanner(LoadPlanner):
    """Fills pieces from whatever chunks overlap with them."""

    def __init__(self, pieces: Sequence[Piece], manifest: Manifest) -> None:
        self._pieces = {(piece.key, piece.start): piece for piece in pieces}
        self._flat = {place: piece.flat() for place, piece in self._pieces.items()}
        self._manifest = manifest

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Nothing: the pieces and the manifest are known."""

    def create_local_plan(self) -> LoadPlan:
        items = []
        for (key, start), piece in self._pieces.items():
            for chunk in overlapping(self._manifest, piece):
                first, last = max(chunk.start, start), min(chunk.stop, piece.stop)
                items.append(
                    ReadItem(
                        type=LoadItemType.TENSOR,
                        dest_index=MetadataIndex(key, torch.Size([start])),
                        dest_offsets=torch.Size([first - start]),
                        storage_index=MetadataIndex(key, torch.Size([chunk.start])),
                        storage_offsets=torch.Size([first - chunk.start]),
                        lengths=torch.Size([last - first]),
                    )
                )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("only arrays are read")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._flat[read_item.dest_index.fqn, _first(read_item.dest_index)]
        return target.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was a view."""

    def finish(self) -> None:
        """Give the values to those tensors whose elements do not lie in row-major order."""
        with torch.no_grad():
            for place, piece in self._pieces.items():
                flat = self._flat[place]
                if flat.numel() and flat.data_ptr() != piece.tensor.data_ptr():
                    piece.tensor.copy_(flat.view(piece.tensor.shape))


class ManifestReader(FileSystemReader):
    """Takes from the manifest what torch's reader would unpickle."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder)
        self._manifest = manifest

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        known: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        places = {}
        for key, array in self._manifest.arrays.items():
            chunks = [ChunkStorageMetadata(torch.Size([c.start]), torch.Size([c.stop - c.start])) for c in array.chunks]
            size = torch.Size([torch.Size(array.shape).numel()])
            known[key] = TensorStorageMetadata(TensorProperties(dtype=array.torch_dtype), size, chunks)
            for chunk in array.chunks:
                index = MetadataIndex(key, torch.Size([chunk.start]))
                places[index] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
        meta = StorageMeta(load_id=self.load_id)
        return Metadata(state_dict_metadata=known, storage_data=places, storage_meta=meta)


def _first(index: MetadataIndex) -> int:
    assert index.offset is not None
    return index.offset[0]


def overlapping(manifest: Manifest, piece: Piece) -> list[Chunk]:
    """Chunks that have elements of a piece."""
    return [
        chunk for chunk in manifest.arrays[piece.key].chunks if chunk.start < piece.stop and piece.start < chunk.stop
    ]


def chunk_digest(folder: str | os.PathLike[str], file: str, offset: int, length: int) -> str:
    """Checksum of some bytes of a file; of fewer where it has not as many."""
    with (Path(folder) / file).open("rb") as opened:
        opened.seek(offset)
        return digest(opened.read(length))
