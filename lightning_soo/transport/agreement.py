"""Before a plan's first collective: do all ranks mean the same thing?

Ranks that differ would not fail, they would hang or reset each other's connections. So a fixed number of hashes is
exchanged first, and a rank whose own preparation failed says so here instead of leaving its peers waiting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any

import torch

from lightning_soo.transport.process_group import Transport

_SHOWN = 200  # characters of an entry in a message


class AgreementError(RuntimeError):
    """Ranks differ, or one failed; raised on every rank."""


def agree(
    transport: Transport, sections: Mapping[str, str | Sequence[str]], error: BaseException | None = None
) -> None:
    """Compare sections over all ranks.

    Args:
        sections: name -> what must be the same everywhere, as a text or as a list of entries; the same names in the
            same order on every rank.
        error: what went wrong on this rank while preparing; it takes the place of every section.

    Raises:
        AgreementError: names the first differing section, its first differing entry, the ranks, and what this entry is
            on one of them and on rank 0; or the ranks that failed.
    """
    if transport.size == 1:
        if error is not None:
            raise error
        return
    listed = {name: [value] if isinstance(value, str) else list(value) for name, value in sections.items()}
    row = [int(error is not None)]
    row += [_hash("\n".join(entries)) for entries in listed.values()] if error is None else [0] * len(listed)
    rows = transport.all_gather_integers(row, f"the agreement on {', '.join(listed)}")
    failed = [rank for rank, other in enumerate(rows) if other[0]]
    if failed:
        if error is not None:
            raise error
        raise AgreementError(f"rank {failed} could not prepare its plan; that rank's own error says why")
    for index, (name, entries) in enumerate(listed.items(), start=1):
        differing = [rank for rank, other in enumerate(rows) if other[index] != rows[0][index]]
        if differing:
            difference = _first_difference(transport, entries, differing[0])
            raise AgreementError(f"{name} of rank {differing} differs from rank 0's: {difference}")


def entries_of(options: Any) -> list[str]:
    """A dataclass of options as entries, one for each field (``workers.deadline=5.0``): a difference is named by it."""
    return [f"{name}={_text(value)}" for name, value in _fields(options, "")]


def _fields(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _fields(getattr(value, entry.name), f"{name}.{entry.name}" if name else entry.name)
    elif isinstance(value, tuple) and any(map(is_dataclass, value)):
        for index, entry in enumerate(value):
            yield from _fields(entry, f"{name}[{index}]")
    else:
        yield name, value


def _text(value: Any) -> str:
    """The same on every rank: a function's repr has its address."""
    return str(getattr(value, "__qualname__", type(value).__name__)) if callable(value) else repr(value)


def _first_difference(transport: Transport, entries: Sequence[str], other: int) -> str:
    """The first entry in which a rank differs from rank 0; every rank gets both. Collective."""
    own = "\0".join(entries) if transport.rank in (0, other) else ""
    data = torch.frombuffer(bytearray(own.encode()), dtype=torch.uint8) if own else torch.empty(0, dtype=torch.uint8)
    received = [bytes(part.tolist()).decode() for part in transport.gather_bytes(data, None, "what differs")]
    first, theirs = (received[rank].split("\0") for rank in (0, other))
    for here, there in zip_longest(first, theirs, fillvalue="nothing"):
        if here != there:
            return f"{there[:_SHOWN]} on rank {other}, {here[:_SHOWN]} on rank 0"
    return "they hash differently"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
