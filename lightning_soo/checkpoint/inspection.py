"""What a checkpoint holds, in words, and whether it is whole: for a person, without the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.manifest import FILE, Array, Manifest
from lightning_soo.checkpoint.sources import FolderSource, MemorySource, Source, read_file, single_file

SUBFOLDER = "second_order"
"""Where a folder of another library's (Accelerate, DeepSpeed, Transformers) has ours."""


@dataclass
class Inspection:
    """
    Attributes:
        lines: what there is.
        problems: what is wrong; empty where everything was compared and is whole.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def locate(path: str | Path) -> Path:
    """The folder or file that has our part of a checkpoint.

    Raises:
        CheckpointError: there is nothing, or nothing of ours.
    """
    found = Path(path)
    for candidate in (found, found / SUBFOLDER):
        if store.is_store(candidate):
            return store.find(candidate)
    if found.is_file():
        return found
    if not found.exists():
        raise CheckpointError(f"{found}: no such file or folder")
    inner = sorted(one.parent for one in found.glob(f"**/{FILE}"))
    hint = f"; below it is {inner[0]}" if inner else ""
    raise CheckpointError(f"{found} is no checkpoint of lightning_soo: it has no {FILE}{hint}")


def open_checkpoint(path: str | Path) -> Source:
    """A folder, or one file of Lightning's or of ``torch.save``.

    Raises:
        CheckpointError: damaged, or no checkpoint.
    """
    found = locate(path)
    if found.is_dir():
        return FolderSource(found)
    whole = read_file(found)
    if "state_dict" in whole:
        return single_file(found, whole)
    if "param_groups" in whole:  # an optimizer's state alone
        return single_file(found, {"state_dict": {}, "optimizer_states": [whole]})
    raise CheckpointError(f"{found} has neither 'state_dict' nor 'param_groups', but {sorted(map(str, whole))[:5]}")


def inspect(path: str | Path) -> Inspection:
    """List and compare everything.

    Raises:
        CheckpointError: so damaged that nothing can be listed, or no checkpoint.
    """
    found = locate(path)
    if found.is_dir():
        manifest = Manifest.read(found)
        lines = [
            f"{found}: format {manifest.format}, written by lightning_soo {manifest.version} on "
            f"{manifest.world_size} rank{'s' * (manifest.world_size > 1)}"
        ]
        result = Inspection(lines + _content(manifest.content, manifest.arrays))
        result.problems = [str(problem) for problem in store.verify(found, manifest)]
        size = sum(path.stat().st_size for path in found.iterdir() if path.is_file())
        result.lines.append(f"{len(manifest.files)} files, {size:,} bytes")
        return result
    source = open_checkpoint(found)
    assert isinstance(source, MemorySource)
    names = {key.split("/", 1)[1] for key in source.arrays if key.startswith("buffer/")}
    arrays = {key: array for key, array in source.arrays.items() if not key.startswith("buffer/")}
    lines = [f"{found}: one file, {len(names)} weights"]
    return Inspection(lines + _content(source.content, arrays))


def _content(content: Mapping[str, Any], arrays: Mapping[str, Array]) -> list[str]:
    lines = []
    for number, optimizer in enumerate(content["optimizers"]):
        lines += _optimizer(number, optimizer)
    kinds: dict[str, list[Array]] = {}
    for key, array in arrays.items():
        kinds.setdefault(_kind(key), []).append(array)
    rows = [("arrays", "number", "elements", "bytes")]
    for kind, members in sorted(kinds.items()):
        elements = [_numel(one.shape) for one in members]
        sizes = [count * one.torch_dtype.itemsize for count, one in zip(elements, members, strict=True)]
        rows.append((kind, f"{len(members):,}", f"{sum(elements):,}", f"{sum(sizes):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return lines + ["  ".join(_pad(row, widths)).rstrip() for row in rows]


def _optimizer(number: int, optimizer: Mapping[str, Any]) -> list[str]:
    blocks = optimizer.get("blocks") or {}
    name = optimizer.get("class") or blocks.get("method") or "of torch"
    words = [f"optimizer {number}: {name}"]
    if "steps" in blocks:
        words.append(f"{blocks['steps']} steps")
    words.append(f"{len(optimizer['parameters'])} parameters in {len(optimizer['groups'])} groups")
    if blocks.get("blocks"):
        words.append(f"{len(blocks['blocks'])} blocks, {len(blocks['in_flight'])} refreshes in flight")
    if optimizer.get("plan"):
        words.append(f"plan {optimizer['plan'][:8]}")
    if optimizer.get("engine"):
        words.append(f"saved under {optimizer['engine']}")
    rates = sorted({float(group["lr"]) for group in optimizer["groups"] if "lr" in group})
    if rates:
        words.append("lr " + ", ".join(f"{rate:g}" for rate in rates))
    return ["; ".join(words)]


def _kind(key: str) -> str:
    if "/moment/" in key:
        return f"{key.split('/', 1)[0]} {key.rsplit('/', 1)[1]}"
    if "/blocks/" in key:
        for word in ("statistics", "roots", "moments"):
            if f"/{word}/" in key and "/in_flight/" not in key:
                return f"{key.split('/', 1)[0]} {word}"
        return f"{key.split('/', 1)[0]} in flight"
    return "weights" if key.startswith("model/") else "buffers"


def _numel(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
