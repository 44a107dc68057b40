"""Where a checkpoint's arrays are read from: a folder of ours, or one file that is in memory."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.manifest import Array, Manifest, digest, dtype_name
from lightning_soo.checkpoint.pieces import Piece
from lightning_soo.checkpoint.preconditioners import PRECONDITIONERS
from lightning_soo.checkpoint.trees import take_apart
from lightning_soo.checkpoint.weights import BUFFER, MODEL
from lightning_soo.placement.fragments import canonical_name


class Source(Protocol):
    """What :func:`lightning_soo.load_checkpoint` needs of a checkpoint; every rank opens its own."""

    @property
    def where(self) -> str:
        """For messages."""

    @property
    def content(self) -> Mapping[str, Any]:
        """What is no array."""

    @property
    def arrays(self) -> Mapping[str, Array]: ...

    def digest(self) -> str:
        """The same on every rank that has opened the same checkpoint."""

    def check(self, pieces: Sequence[Piece]) -> None:
        """Raise CheckpointError unless all that the pieces need is there and whole."""

    def read(self, pieces: Sequence[Piece]) -> None:
        """Overwrite the pieces' tensors."""


class FolderSource:
    """A folder that :func:`lightning_soo.save_checkpoint` wrote.

    Raises:
        CheckpointError: it is not complete, damaged, or of a newer version.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = store.find(folder)
        self._manifest = Manifest.read(self._folder)
        self.where = str(self._folder)
        self.content: Mapping[str, Any] = self._manifest.content
        self.arrays = self._manifest.arrays

    def digest(self) -> str:
        return self._manifest.digest()

    def check(self, pieces: Sequence[Piece]) -> None:
        store.check(self._folder, self._manifest, pieces)

    def read(self, pieces: Sequence[Piece]) -> None:
        store.read(self._folder, self._manifest, pieces)


@dataclass(frozen=True)
class MemorySource:
    """Tensors by the names that they have in a folder."""

    where: str
    content: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @cached_property
    def arrays(self) -> Mapping[str, Array]:
        return {key: Array(tuple(one.shape), dtype_name(one.dtype), ()) for key, one in self.tensors.items()}

    def digest(self) -> str:
        return digest(repr([(key, array.shape) for key, array in self.arrays.items()]).encode())

    def check(self, pieces: Sequence[Piece]) -> None:
        """The file's own checksums were compared when it was opened."""

    @torch.no_grad()
    def read(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            flat = self.tensors[piece.key].reshape(-1)[piece.start : piece.stop]
            piece.tensor.copy_(flat.view(piece.tensor.shape))


def read_file(path: str | os.PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
    """What ``torch.save`` wrote, after its checksums were compared; tensors stay on disk until they are used.

    Args:
        weights_only: see :func:`load_plain`.

    Raises:
        CheckpointError: truncated or damaged, with the record; no file of ``torch.save``.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged header leads zipfile to any of a dozen kinds
        raise CheckpointError(f"{path} is truncated or damaged ({error}): take an earlier checkpoint") from None
    if broken is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {broken!r} differs; take an earlier checkpoint")
    try:
        found: dict[str, Any] = load_plain(path, weights_only=weights_only, mmap=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): take an earlier checkpoint") from None
    return found


def load_plain(path: str | os.PathLike[str], *, weights_only: bool | None = None, **options: Any) -> Any:
    """``torch.load`` to the CPU; objects that only pickle reads are refused unless ``weights_only`` is False.

    None is torch's default: refused unless the environment says otherwise.

    Raises:
        CheckpointError: there are such objects, or what is to become them is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only, **options)
    except pickle.UnpicklingError as error:
        found = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} holds an object that is no plain data, of save_hyperparameters() or of what was saved beside the "
            f"model ({found[0] if found else error!r}): if you trust the file, load it with weights_only=False "
            "(Trainer.fit and fabric.load take it; Lightning does not hand it to a strategy soo_...: set "
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 there), or allow its class by torch.serialization.add_safe_globals"
        ) from None


def single_file(
    path: str | os.PathLike[str],
    checkpoint: Mapping[str, Any],
    aliases: Collection[str] = (),
    names: Sequence[Sequence[str]] = (),
) -> MemorySource:
    """One file of Lightning's (``state_dict``, ``optimizer_states``), as if it were a folder.

    Args:
        aliases: further names of parameters that are known by another one (tied weights).
        names: of the parameters of each optimizer, for the state of a torch optimizer that was given none.

    Raises:
        CheckpointError: optimizer states whose parameters have no names.
    """
    weights = {name: one for name, one in checkpoint["state_dict"].items() if name not in aliases}
    tensors = {f"{kind}{name}": one for name, one in weights.items() for kind in (MODEL, BUFFER)}
    contents = []
    beside = checkpoint.get(PRECONDITIONERS, ())
    for number, state in enumerate(checkpoint.get("optimizer_states", ())):
        blocks = state["second_order"] if "second_order" in state else beside[number] if beside else None
        own = (
            _names_in(state, names[number] if number < len(names) else ()) if blocks is None else list(blocks["names"])
        )
        content, moments = _optimizer(number, state, own, weights)
        tree, pieces = take_apart(blocks, f"optimizer.{number}/blocks")
        contents.append({**content, "blocks": tree})
        tensors |= moments | {piece.key: piece.tensor for piece in pieces}
    return MemorySource(str(path), {"optimizers": contents, "weights": {}, "extra": {}}, tensors)


def _names_in(state: Mapping[str, Any], otherwise: Sequence[str]) -> list[str]:
    """Of a torch optimizer's parameters: what it was given, else what an engine has put in place of their numbers."""
    given = [canonical_name(name) for group in state["param_groups"] for name in group.get("param_names", ())]
    numbers = [index for group in state["param_groups"] for index in group["params"]]
    if not given and all(isinstance(number, str) for number in numbers):
        given = [canonical_name(number) for number in numbers]
    return given or list(otherwise)


def _optimizer(
    number: int, state: Mapping[str, Any], names: Sequence[str], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    numbers = [index for group in state["param_groups"] for index in group["params"]]
    if len(names) != len(numbers):
        raise CheckpointError(
            f"optimizer {number} was saved with {len(numbers)} parameters, of which {len(names)} have names: build it "
            "with named_parameters() or the model"
        )
    tensors: dict[str, Tensor] = {}
    counters: dict[str, dict[str, Any]] = {}
    for name, index in zip(names, numbers, strict=True):
        moments = state["state"].get(index, {})
        counters[name] = {}
        for field, value in moments.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                counters[name][field] = value.item()
            elif isinstance(value, Tensor):
                known = weights.get(name)
                if known is not None and known.numel() != value.numel():
                    raise CheckpointError(
                        f"optimizer {number}: {field} of {name!r} has shape {tuple(value.shape)}, the parameter has "
                        f"{tuple(known.shape)}"
                    )
                tensors[f"optimizer.{number}/moment/{name}/{field}"] = value
            else:
                counters[name][field] = value
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "param_names", "second_order")}
        for group in state["param_groups"]
    ]
    owners = [group for group, row in enumerate(state["param_groups"]) for _ in row["params"]]
    parameters = {name: {"group": group, "trainable": True} for name, group in zip(names, owners, strict=True)}
    return {"parameters": parameters, "groups": groups, "state": counters}, tensors
