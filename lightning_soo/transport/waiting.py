"""Waiting for other ranks: bounded, and with the name of what is waited for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lightning_soo.transport.notes import NOTE, read_notes

# seconds of waiting before other ranks can read what for: a step without a late rank never writes there
_NOTED_AFTER = 1.0
_SHORTEST = 1e-3  # a bound of zero seconds would be none


class TransportError(RuntimeError):
    """Other ranks did not answer, or a collective failed: says which one, of which step, and who has not come."""


@dataclass
class Clock:
    """The optimizer's step, as messages name it; shared by all transports of one optimizer."""

    step: int | None = None


class Waiting:
    """How one rank of a group waits for the others.

    Under gloo a wait ends at the bound. NCCL's waits do not block the process, and its watchdog ends it after the
    process group's own timeout: there nothing is added.

    Attributes:
        own: seconds after which the process group gives up by itself; None where that is not known.
        timeout: seconds that a collective may take here, at most those.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        device: torch.device,
        timeout: float | None,
        clock: Clock,
    ) -> None:
        """Args: ranks: of the group, as the default group numbers them."""
        backend = _backend(group, device)
        self._ranks, self._clock = ranks, clock
        self._name = str(getattr(group or dist.group.WORLD, "group_name", ""))
        self.own = _timeout_of(backend)
        bounds = [bound for bound in (self.own, timeout) if bound is not None]
        self.timeout = min(bounds) if bounds else None
        self._is_bounded = type(backend).__name__ == "ProcessGroupGloo" and self.timeout is not None
        self._noted_after = min(_NOTED_AFTER, (self.timeout or _NOTED_AFTER) / 4)

    def describe(self, purpose: str, operation: str) -> str:
        """``the roots of step 12 (broadcast among 4 ranks)``."""
        step = "" if self._clock.step is None else f" of step {self._clock.step}"
        return f"{purpose}{step} ({operation} among {len(self._ranks)} ranks)"

    def for_all(self, handles: Sequence[Any], what: str) -> None:
        """Wait for asynchronous collectives, at most ``timeout`` seconds for all of them together.

        Args:
            what: of :meth:`describe`.

        Raises:
            TransportError: the time is over, or a collective failed (a peer has gone).
        """
        if not self._is_bounded or self.timeout is None:
            for handle in handles:
                handle.wait()
            return
        begin = time.monotonic()
        try:
            for handle in handles:
                if not _ends(handle, begin + self._noted_after):
                    NOTE.write(self._name, what)
                    if not _ends(handle, begin + self.timeout):
                        self._give_up(handle, what)
        except TransportError:
            raise
        except RuntimeError as error:
            raise self._failed(what, error) from error
        NOTE.clear()

    def for_transfer(self, handle: Any, what: str) -> None:
        """Wait for one send or receive, which cannot be taken up again once its bound is over.

        Raises:
            TransportError: as :meth:`for_all`.
        """
        try:
            if self._is_bounded and self.timeout is not None:
                handle.wait(timedelta(seconds=self.timeout))
            else:
                handle.wait()
        except RuntimeError as error:
            raise self._failed(what, error) from error

    def _give_up(self, handle: Any, what: str) -> None:
        missing = self._missing(what)
        if not _ends(handle, 0.0):  # nor while that was looked up
            raise TransportError(f"rank {dist.get_rank()}: {what} not answered in {self.timeout:g} s; {missing}")

    def _failed(self, what: str, error: RuntimeError) -> TransportError:
        NOTE.write(self._name, what)
        return TransportError(f"rank {dist.get_rank()}: {what} failed ({error}); {self._missing(what)}")

    def _missing(self, what: str) -> str:
        """Which ranks do not wait for the same, as far as they say so."""
        time.sleep(2 * self._noted_after)  # a rank that came at the end has not said so yet
        notes = read_notes([rank for rank in self._ranks if rank != dist.get_rank()])
        if notes is None:
            return "which ranks have not come is not known, as their store does not answer"
        absent = [rank for rank, (_, text) in notes.items() if not text]
        found = [f"rank {absent} has not come to it"] if absent else []
        for rank, (group, text) in notes.items():
            if text and (group, text) != (self._name, what):
                found.append(f"rank {rank} waits for {text}" + " in another process group" * (group != self._name))
        if not found:
            return "all ranks wait for it: the network between them does not answer"
        return "; ".join(found) + ". What these ranks do instead is in their logs and stacks"


def _ends(handle: Any, end: float) -> bool:
    """Whether a collective is over by some time of the monotonic clock; raises what it has failed with."""
    try:
        handle.wait(timedelta(seconds=max(end - time.monotonic(), _SHORTEST)))
    except RuntimeError:
        if not handle.is_completed():
            return False
        handle.wait()  # raises what it has failed with; nothing, where it ended between the two lines
    return True


def _backend(group: dist.ProcessGroup | None, device: torch.device) -> Any:
    try:
        found = (group or dist.group.WORLD)._get_backend(device)  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None
    return getattr(found, "wrapped_pg", found)  # of TORCH_DISTRIBUTED_DEBUG=DETAIL


def _timeout_of(backend: Any) -> float | None:
    try:
        return float(backend.options._timeout.total_seconds())
    except (AttributeError, RuntimeError):
        return None
