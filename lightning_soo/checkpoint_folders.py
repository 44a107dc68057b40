"""A model and its optimizers as one checkpoint folder: written and read by any number of ranks under any engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_soo.checkpoint import store
from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.checkpoint.module_states import give_states, want_states
from lightning_soo.checkpoint.pieces import Piece, Wanted
from lightning_soo.checkpoint.report import LoadReport
from lightning_soo.checkpoint.sources import FolderSource, Source
from lightning_soo.checkpoint.weights import give_weights, want_weights
from lightning_soo.optim import portable
from lightning_soo.optim.portable import Portable
from lightning_soo.transport import Transport

logger = logging.getLogger(__name__)


def save_checkpoint(
    folder: store.Folder,
    model: nn.Module,
    optimizers: Portable | Sequence[Portable],
    *,
    extra: Mapping[str, Any] | None = None,
    background: store.BackgroundSaver | None = None,
    files: Callable[[Path], None] | None = None,
    frozen: bool = True,
) -> None:
    """Write weights, moments, preconditioners and refreshes in flight to a folder, each rank its own part. Collective.

    Any number of ranks loads it, under any engine (one process, DDP, FSDP1, FSDP2, hybrid sharding, ZeRO).
    The folder has its name only when everything is on disk; one of this name that is there already is kept until then.

    Args:
        model: as the engine has wrapped it.
        optimizers: ours, of this model.
        extra: plain data (numbers, strings, lists, dictionaries) to be returned by :func:`load_checkpoint`; rank 0's.
        background: saves while training goes on, at the price of a copy of this rank's part.
        files: called on rank 0 with the unfinished folder, to write further files into it; in the background when the
            rest is written, so it must not look at what training changes.
        frozen: False leaves out weights that are not trained, of a pretrained model with adapters for instance: whoever
            loads the checkpoint has to have them already.

    Raises:
        CheckpointError: parameters that no rank has given, or twice; a URL.
        TypeError: ``extra`` is not plain data.
    """
    listed = _listed(optimizers)
    _attach(model, listed)
    transport = _transport(listed)
    contents, pieces = [], []
    for number, optimizer in enumerate(listed):
        content, given = portable.give(optimizer, number)
        contents.append(content)
        pieces += given
    known = {name for content in contents for name in content["parameters"]}
    weights, shapes = give_weights(model, known, transport, frozen=frozen)
    told = dict(extra or {}) if transport.rank == 0 else {}
    states, kept = give_states(model) if transport.rank == 0 else ({}, [])
    pieces += kept
    content = {"optimizers": contents, "weights": shapes, "extra": told, "frozen": frozen, "states": states}
    options: dict[str, Any] = {"files": files if transport.rank == 0 else None}
    if background is not None:
        background.save(folder, _once(pieces + weights), content, **options)
    else:
        together = transport.size > 1
        store.save(folder, _once(pieces + weights), content, group=transport.group, distributed=together, **options)


def load_checkpoint(
    folder: store.Folder | Source,
    model: nn.Module,
    optimizers: Portable | Sequence[Portable],
    *,
    strict: bool = True,
    strict_weights: bool | None = None,
) -> tuple[LoadReport, dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote, each rank what it needs. Collective.

    All that is read is compared with its checksum first; on an error nothing has changed, on any rank.

    Args:
        folder: or what has been opened of a checkpoint already.
        model: as the engine has wrapped it.
        optimizers: as many as were saved; none loads the weights alone.
        strict: False takes what fits, by name and shape, and reports the rest.
        strict_weights: the same of what no optimizer holds; None is ``strict``.

    Returns:
        What was taken, and ``extra``.

    Raises:
        CheckpointError: damaged, incomplete, of another model or method, or of a newer version; on every rank.
    """
    listed = _listed(optimizers)
    source, wanted, report = _prepare(folder, model, listed, strict=strict, strict_weights=strict_weights)
    source.read(_once([piece for one in wanted for piece in one.pieces]))
    for one in wanted:
        one.install()
    for optimizer in listed:
        write_back = optimizer._layout.write_back if optimizer._layout is not None else None
        if write_back is not None:
            write_back()
    if not report.is_complete and _transport(listed).rank == 0:
        logger.warning("loaded from %s:\n%s", source.where, report)
    return report, dict(source.content["extra"])


def check_checkpoint(
    folder: store.Folder | Source,
    model: nn.Module,
    optimizers: Portable | Sequence[Portable],
    *,
    strict: bool = True,
    strict_weights: bool | None = None,
) -> LoadReport:
    """What :func:`load_checkpoint` would take; nothing is changed. Collective.

    Raises:
        CheckpointError: as of :func:`load_checkpoint`.
    """
    return _prepare(folder, model, _listed(optimizers), strict=strict, strict_weights=strict_weights)[2]


def _prepare(
    folder: store.Folder | Source,
    model: nn.Module,
    listed: list[Portable],
    *,
    strict: bool,
    strict_weights: bool | None,
) -> tuple[Source, list[Wanted], LoadReport]:
    _attach(model, listed)
    transport, report = _transport(listed), LoadReport()
    source: Source | None = None
    wanted, error = [], None
    try:
        source = FolderSource(folder) if isinstance(folder, (str, os.PathLike)) else folder
        weights = strict if strict_weights is None else strict_weights
        wanted = _wanted(source, model, listed, report, strict=strict, strict_weights=weights)
        source.check([piece for one in wanted for piece in one.pieces])
    except (CheckpointError, OSError) as raised:
        error = raised
    _agree(transport, source, error)
    assert source is not None
    return source, wanted, report


def _wanted(
    source: Source,
    model: nn.Module,
    optimizers: Sequence[Portable],
    report: LoadReport,
    *,
    strict: bool,
    strict_weights: bool,
) -> list[Wanted]:
    contents = source.content["optimizers"] if optimizers else []
    if len(contents) != len(optimizers):
        raise CheckpointError(
            f"the checkpoint has {len(contents)} optimizers, here are {len(optimizers)}: load it with those "
            "that it was saved with"
        )
    found = [
        portable.want(optimizer, content, source.arrays, number, report, strict=strict)
        for number, (optimizer, content) in enumerate(zip(optimizers, contents, strict=True))
    ]
    known = {spec.name for optimizer in optimizers if optimizer._layout for spec in optimizer._layout.specs}
    rest = LoadReport()
    found.append(want_weights(model, known, source.arrays, rest, frozen=source.content.get("frozen", True)))
    if "states" in source.content:
        found.append(want_states(model, source.content["states"], source.arrays, rest))
    if strict != strict_weights:
        (report if strict else rest).refuse()
    report.add(rest)
    if strict and strict_weights:
        report.refuse()
    return found


def _agree(transport: Transport, source: Source | None, error: Exception | None) -> None:
    """One rank's refusal is everyone's, before anything is changed."""
    rows = transport.all_gather_integers([int(error is not None), _number(source)])
    failed = [rank for rank, row in enumerate(rows) if row[0]]
    if error is not None:
        raise error
    if failed:
        raise CheckpointError(
            f"rank {failed[0]} cannot load this checkpoint, its own error says why; nothing was changed"
        )
    differing = [rank for rank, row in enumerate(rows) if row[1] != rows[0][1]]
    if differing:
        raise CheckpointError(
            f"rank {differing[0]} reads another checkpoint than rank 0: every rank needs the same files, on a "
            "disk that all machines share"
        )


def _number(source: Source | None) -> int:
    return int(source.digest()[:15], 16) if source is not None else 0


def _listed(optimizers: Portable | Sequence[Portable]) -> list[Portable]:
    listed = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in listed]
    for optimizer in inner:
        if not hasattr(optimizer, "_fragment_table"):
            raise TypeError(
                f"{type(optimizer).__name__} is no optimizer of lightning_soo: torch.save(optimizer.state_dict(), ...) "
                "saves others"
            )
    return inner


def _attach(model: nn.Module, optimizers: Sequence[Portable]) -> None:
    for optimizer in optimizers:
        if optimizer._layout is None or optimizer._signature != optimizer._current_signature():
            optimizer.attach(model)


def _transport(optimizers: Sequence[Portable]) -> Transport:
    return optimizers[0]._transport if optimizers else Transport(enabled=dist.is_initialized())


def _once(pieces: Sequence[Piece]) -> list[Piece]:
    """Of parameters that two optimizers share, one piece each."""
    return list({(piece.key, piece.start, id(piece.tensor.untyped_storage())): piece for piece in pieces}.values())
