"""Nested plain data with tensors in it, taken apart into arrays and json, and put together again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.pieces import Piece, whole

_ARRAY = "array"


def take_apart(tree: Any, key: str) -> tuple[Any, list[Piece]]:
    """Plain data in which every tensor is ``{"array": key}``, and the tensors as pieces.

    Args:
        key: what the arrays' names begin with; the rest is where they are in the tree.
    """
    pieces: list[Piece] = []

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            pieces.append(whole(path, value))
            return {_ARRAY: path}
        if isinstance(value, Mapping):
            return {str(name): walk(inner, f"{path}/{name}") for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(inner, f"{path}/{index}") for index, inner in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{path}: a {type(value).__name__} cannot be kept in a checkpoint")

    return walk(tree, key), pieces


def merge(trees: Sequence[Any]) -> Any:
    """What several ranks know of the same things: of each entry the first rank's that has it.

    Lists are of the same things in the same order on every rank.
    """
    first = trees[0]
    if isinstance(first, Mapping) and _ARRAY not in first:
        names = dict.fromkeys(name for tree in trees for name in tree)
        return {name: merge([tree[name] for tree in trees if name in tree]) for name in names}
    if isinstance(first, list) and all(isinstance(tree, list) and len(tree) == len(first) for tree in trees):
        return [merge(rows) for rows in zip(*trees, strict=True)]
    return next((tree for tree in trees if tree is not None), None)


def put_together(tree: Any, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> tuple[Any, list[Piece]]:
    """The tree with an empty tensor in the place of each array, and these as pieces to be filled.

    Raises:
        CheckpointError: an array is named that does not exist.
    """
    pieces: list[Piece] = []

    def empty(key: str) -> Tensor:
        if key not in shapes:
            raise CheckpointError(f"the checkpoint names an array {key!r} that it does not have")
        shape, dtype = shapes[key]
        pieces.append(whole(key, torch.empty(shape, dtype=dtype)))
        return pieces[-1].tensor

    return _filled(tree, empty), pieces


def as_tensors(tree: Any) -> dict[str, Tensor]:
    """The tree as a flat dictionary of nothing but tensors, for those who carry nothing else."""
    plain, pieces = take_apart(tree, "array")
    text = bytearray(json.dumps(plain).encode())
    return {"content": torch.frombuffer(text, dtype=torch.uint8), **{piece.key: piece.tensor for piece in pieces}}


def from_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """What :func:`as_tensors` was given."""
    text = tensors["content"].cpu().numpy().tobytes()
    return _filled(json.loads(text), lambda key: tensors[key])


def _filled(tree: Any, make: Callable[[str], Tensor]) -> Any:
    if isinstance(tree, Mapping):
        if set(tree) == {_ARRAY}:
            return make(tree[_ARRAY])
        return {name: _filled(inner, make) for name, inner in tree.items()}
    return [_filled(inner, make) for inner in tree] if isinstance(tree, list) else tree
