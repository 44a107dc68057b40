"""The only place where collectives are called. What is sent, and when, comes from the plan and the schedule alone."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_soo.transport.waiting import Clock, TransportError, Waiting


class Pending:
    """Buffers on their way."""

    def __init__(self, buffers: list[Tensor], handles: list[Any], waiting: Waiting | None, what: str) -> None:
        self._buffers, self._handles, self._waiting, self._what = buffers, handles, waiting, what

    def wait(self) -> list[Tensor]:
        """The buffers of all ranks, on the CPU."""
        if self._waiting is not None:
            self._waiting.for_all(self._handles, self._what)
        return [buffer.cpu() for buffer in self._buffers]


class Arriving:
    """One buffer on its way from all ranks of a group."""

    def __init__(
        self, buffer: Tensor, device: torch.device, handle: Any = None, waiting: Waiting | None = None, what: str = ""
    ) -> None:
        self._buffer, self._device = buffer, device
        self._handle, self._waiting, self._what = handle, waiting, what

    def wait(self) -> Tensor:
        """The parts of all ranks end to end, on the device that was sent from."""
        if self._waiting is not None:
            self._waiting.for_all([self._handle], self._what)
        return self._buffer.to(self._device)


class Transport:
    """Collectives over a group of ranks; with one rank every call is local and free.

    Every call says what it is for, in the words of the :class:`TransportError` that ends a wait for ranks that do not
    come.

    Attributes:
        rank, size: place and number of ranks in the group.
        calls: collectives started so far, by kind, for tests that compare them with the plan.
        sent: bytes that this rank has given to other ranks so far, by purpose: of a reduction its vector, of a
            broadcast its own buffer, both once.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        enabled: bool = True,
        timeout: float | None = None,
        clock: Clock | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            group: None is the default group.
            enabled: False is a single process whatever is initialised.
            timeout: seconds that a collective may take; None is the process group's own.
            clock: the step that messages name; None begins one.
            device: what this rank trains on; for NCCL, None is the current one.
        """
        active = enabled and dist.is_available() and dist.is_initialized()
        self._group = group if active else None
        self.rank = dist.get_rank(group) if active else 0
        self.size = dist.get_world_size(group) if active else 1
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._device = torch.device("cpu")
        if self.size > 1 and "nccl" in str(dist.get_backend(group)) and "gloo" not in str(dist.get_backend(group)):
            own = device if device is not None and device.type == "cuda" else None
            self._device = own or torch.device("cuda", torch.cuda.current_device())
        self._asked, self._clock = timeout, clock or Clock()
        self._waiting: Waiting | None = None
        if self.size > 1:
            ranks = [self._global(place) for place in range(self.size)]
            self._waiting = Waiting(group, ranks, self._device, timeout, self._clock)

    @property
    def timeout(self) -> float | None:
        """Seconds that a collective may take; None where nobody waits, or nothing is known."""
        return self._waiting.timeout if self._waiting is not None else None

    @property
    def group_timeout(self) -> float | None:
        """Seconds after which the process group gives up by itself; None as above."""
        return self._waiting.own if self._waiting is not None else None

    def begin_step(self, step: int) -> None:
        """From here on waits are for this step, in messages of this transport and of those made from it. Local."""
        self._clock.step = step

    def over(self, group: dist.ProcessGroup | None, *, enabled: bool = True) -> Transport:
        """The same over another group. Local."""
        return Transport(group, enabled=enabled, timeout=self._asked, clock=self._clock, device=self._device)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """None is the default group."""
        return self._group

    def among(self, ranks: Sequence[int]) -> Transport:
        """Over some ranks of this group. Collective among them."""
        own = sorted(self._global(rank) for rank in ranks)
        return self.over(dist.new_group(own, use_local_synchronization=True))

    def largest(self, values: Tensor, purpose: str) -> Tensor:
        """Elementwise maximum over ranks of a small vector."""
        if self.size == 1:
            return values
        return self._reduce(values, dist.ReduceOp.MAX, purpose)

    def total(self, values: Tensor, purpose: str) -> Tensor:
        """Elementwise sum over ranks of a small vector; the same bits on all of them."""
        if self.size == 1:
            return values
        return self._reduce(values, dist.ReduceOp.SUM, purpose)

    def _reduce(self, values: Tensor, operation: Any, purpose: str) -> Tensor:
        self.calls["all_reduce"] += 1
        self.sent[purpose] += values.numel() * values.element_size()
        moved = values.to(self._device)
        self._wait(dist.all_reduce(moved, op=operation, group=self._group, async_op=True), purpose, "all_reduce")
        return moved.to(values.device)

    def _wait(self, handle: Any, purpose: str, operation: str) -> None:
        assert self._waiting is not None
        self._waiting.for_all([handle], self._waiting.describe(purpose, operation))

    def share(self, tensor: Tensor, purpose: str, source: int = 0) -> None:
        """Overwrite ``tensor`` with that of rank ``source``, in place."""
        if self.size > 1:
            moved = tensor.detach().to(self._device).contiguous()
            handle = dist.broadcast(moved, src=self._global(source), group=self._group, async_op=True)
            self._wait(handle, purpose, "broadcast")
            tensor.copy_(moved)

    def start_exchange(
        self, send: Tensor, sent: Sequence[int], received: Sequence[int], purpose: str, into: Tensor | None = None
    ) -> Arriving:
        """Give every rank its part of one flat buffer and get its own part from each, once waited for.

        Args:
            send: one-dimensional; the parts for rank 0, 1, ... end to end.
            sent, received: elements for and from each rank, known to all from the plan; may be zero.
            into: where to put what arrives, ``sum(received)`` elements, if it lies where collectives take place; fresh
                memory otherwise. On one rank what is sent has arrived.

        Raises:
            TransportError: a buffer of another size, before anything is sent.
        """
        if self._waiting is None:
            return Arriving(send, send.device)
        what = self._waiting.describe(purpose, "all_to_all")
        self._check_size(what, send.numel(), sum(sent), "elements")
        self.calls["all_to_all"] += 1
        self.sent[purpose] += (sum(sent) - sent[self.rank]) * send.element_size()
        source = send.to(self._device)
        if into is None or into.device != self._device:
            into = torch.empty(sum(received), dtype=send.dtype, device=self._device)
        handle = dist.all_to_all_single(into, source, list(received), list(sent), group=self._group, async_op=True)
        return Arriving(into, send.device, handle, self._waiting, what)

    def start_broadcast_from_owners(self, sizes: Sequence[int], own: Tensor | None, purpose: str) -> Pending:
        """Every rank gives one flat byte buffer and gets all of them, once the result is waited for.

        One broadcast per owner, all in flight at once: on gloo several times faster than an all_gather of padded
        buffers.

        Args:
            sizes: bytes of each rank's buffer, known to all from the plan.
            own: this rank's buffer (uint8, ``sizes[rank]`` long); None where that is 0.

        Raises:
            TransportError: a buffer of another size, before anything is sent.
        """
        buffers, handles = [], []
        what = self._waiting.describe(purpose, "broadcast") if self._waiting is not None else purpose
        self._check_size(what, 0 if own is None else own.numel(), sizes[self.rank], "bytes")
        if self.size > 1:
            self.sent[purpose] += sizes[self.rank]
        for rank, size in enumerate(sizes):
            if rank == self.rank and own is not None:
                buffer = own.to(self._device)
            else:
                buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            buffers.append(buffer)
            if size and self.size > 1:
                self.calls["broadcast"] += 1
                handles.append(dist.broadcast(buffer, src=self._global(rank), group=self._group, async_op=True))
        return Pending(buffers, handles, self._waiting, what)

    def _check_size(self, what: str, found: int, planned: int, unit: str) -> None:
        if found != planned:
            raise TransportError(
                f"rank {self._global(self.rank)}: {what}: {found} {unit} to send, the plan says {planned}"
            )

    def gather_bytes(self, own: Tensor, to: int | None, purpose: str = "the state for a checkpoint") -> list[Tensor]:
        """Collect one byte buffer of any size from every rank; empty tensors on ranks that are not ``to``.

        Args:
            to: the rank that receives, or None for all.
        """
        if self.size == 1:
            return [own]
        lengths = [row[0] for row in self.all_gather_integers([own.numel()], f"the size of {purpose}")]
        if to is None:
            return self.start_broadcast_from_owners(lengths, own, purpose).wait()
        assert self._waiting is not None
        what = self._waiting.describe(purpose, "gather")
        received = [torch.empty(0, dtype=torch.uint8) for _ in lengths]
        if self.rank == to:
            for rank, length in enumerate(lengths):
                if rank == to:
                    received[rank] = own
                elif length:
                    buffer = torch.empty(length, dtype=torch.uint8, device=self._device)
                    handle = dist.irecv(buffer, src=self._global(rank), group=self._group)
                    self._waiting.for_transfer(handle, what)
                    received[rank] = buffer.cpu()
        elif own.numel():
            handle = dist.isend(own.to(self._device), dst=self._global(to), group=self._group)
            self._waiting.for_transfer(handle, what)
        return received

    def all_gather_integers(
        self, values: Sequence[int], purpose: str = "what ranks tell each other"
    ) -> list[list[int]]:
        """Fixed-size exchange of small integers, for agreement before anything of unknown size is sent."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(list(values), dtype=torch.int64, device=self._device)
        gathered = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(dist.all_gather(gathered, mine, group=self._group, async_op=True), purpose, "all_gather")
        return [row.tolist() for row in gathered]

    def ranks_on_these_cores(self) -> int:
        """How many ranks share the cores that this one may use: all of this machine's, unless each is bound to its own.

        Launchers do not all say it in the environment.
        """
        bound = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = int.from_bytes(hashlib.sha256(f"{platform.node()} {bound}".encode()).digest()[:7], "big")
        return self.all_gather_integers([cores], "the cores of every rank").count([cores])

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)


def share_object(value: Any) -> Any:
    """Rank 0's plain data, on every rank that torch knows of. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    carried = [value]
    dist.broadcast_object_list(carried, src=0)
    return carried[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's plain data, on every rank that torch knows of. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def pack_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Lay tensors of any dtypes end to end as bytes, each padded to 8 so that views stay aligned."""
    flat = torch.zeros(packed_size(tensors), dtype=torch.uint8)
    offset = 0
    for tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        flat[offset : offset + raw.numel()] = raw
        offset += _padded(raw.numel())
    return flat


def packed_size(tensors: Sequence[Tensor]) -> int:
    return sum(_padded(tensor.numel() * tensor.element_size()) for tensor in tensors)


def unpack_bytes(flat: Tensor, templates: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    """Views of :func:`pack_bytes`' buffer as the given shapes and dtypes."""
    found, offset = [], 0
    for shape, dtype in templates:
        count = math.prod(shape) * dtype.itemsize
        found.append(flat[offset : offset + count].view(dtype).view(shape))
        offset += _padded(count)
    return found


def template_size(templates: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes :func:`pack_bytes` takes for tensors of these shapes and dtypes."""
    return sum(_padded(math.prod(shape) * dtype.itemsize) for shape, dtype in templates)


def _padded(count: int) -> int:
    return -(-count // 8) * 8
