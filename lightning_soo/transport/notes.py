"""What each rank waits for, where the others can read it: in the store that the process group was made with.

Nothing here may fail or hang: a note only makes a message better.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

_ANSWERS_IN = 5.0  # seconds


class Note:
    """This process's own.

    Attributes:
        text: process group and what is waited for; empty where that is nothing.
    """

    text = ""

    def write(self, group: str, what: str) -> None:
        """Say what this rank waits for, in which process group."""
        self._set(f"{group}\n{what}")

    def clear(self) -> None:
        """Something has come: this rank waits for nothing."""
        self._set("")

    def _set(self, text: str) -> None:
        if text != self.text:
            self.text = text
            _quietly(lambda store: store.set(_key(dist.get_rank()), text))


NOTE = Note()


def read_notes(ranks: Sequence[int]) -> dict[int, tuple[str, str]] | None:
    """Process group and text of other ranks' notes, empty where they wait for nothing; None where the store does not
    answer."""
    found: dict[int, tuple[str, str]] = {}

    def read(store: Any) -> None:
        for rank in ranks:
            group, _, text = (store.get(_key(rank)).decode() if store.check([_key(rank)]) else "").partition("\n")
            found[rank] = group, text

    _quietly(read)
    return found if len(found) == len(ranks) else None


def _key(rank: int) -> str:
    return f"lightning_soo/waits/{rank}"


def _quietly(action: Callable[[Any], None]) -> None:
    """In a thread: the store of a process that has gone may never answer."""

    def run() -> None:
        try:
            action(dist.distributed_c10d._get_default_store())
        except Exception:  # then there is no note
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_ANSWERS_IN)
