"""Copies between an accelerator and host memory that neither the training thread nor its stream waits for.

Statistics travel to the workers and roots come back on a stream of their own, through pinned memory: only then does
CUDA copy beside kernels (CUDA C++ Programming Guide, "Concurrent Data Transfers"). On a CPU there is nothing to copy
and everything is immediate; on accelerators other than CUDA the copies are plain, blocking ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BUFFERS = 2  # the host may still read one while the next copy fills the other


@dataclass(eq=False)
class _Buffers:
    """Pinned memory of one copy; ``uses`` tells a later copy into the same memory from an earlier one."""

    tensors: list[Tensor]
    uses: int = 0

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        return [(t.shape, t.dtype) for t in self.tensors] == [(t.shape, t.dtype) for t in tensors]


class HostCopy:
    """A copy to host memory that has been started; from :meth:`DeviceCopies.to_host`."""

    def __init__(
        self,
        tensors: list[Tensor],
        device: torch.device | None = None,
        done: torch.cuda.Event | None = None,
        buffers: _Buffers | None = None,
    ) -> None:
        self._tensors, self._device, self._done, self._buffers = tensors, device, done, buffers
        self._use = buffers.uses if buffers is not None else 0

    def ready(self) -> bool:
        """Whether :meth:`wait` would return at once. Never waits."""
        return _ended(self._done)

    def wait(self) -> list[Tensor]:
        """The values at the time the copy was started, as CPU tensors; the calling thread waits for them if need be.

        For tensors on a CPU these are the tensors themselves. Else they are valid until the second next copy of the
        same key is started.

        Raises:
            RuntimeError: two later copies of the same key have been started.
        """
        if self._buffers is not None and self._buffers.uses != self._use:
            raise RuntimeError("this copy is overwritten: two later ones of the same key have been started")
        if self._done is not None:
            self._done.synchronize()
        return self._tensors

    def fence(self) -> None:
        """Let what is launched on the current stream from now on run after the copy; the host does not wait.

        To be called before the original tensors are changed in place.
        """
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)


class DeviceCopy:
    """A copy to a device that has been started; from :meth:`DeviceCopies.to_device`."""

    def __init__(self, tensors: list[Tensor], done: torch.cuda.Event | None = None) -> None:
        self._tensors, self._done = tensors, done

    def ready(self) -> bool:
        """Whether the copy has ended. Never waits."""
        return _ended(self._done)

    def use(self) -> list[Tensor]:
        """The tensors on the device, for the current stream, which waits for the copy; the host does not.

        To be called once on each stream that reads them.
        """
        if self._done is not None:
            for tensor in self._tensors:
                current = torch.cuda.current_stream(tensor.device)
                current.wait_event(self._done)
                tensor.record_stream(current)  # it was allocated for the side stream
        return self._tensors


class DeviceCopies:
    """Starts copies on one side stream per device. For one thread; holds streams, so it is neither copied nor saved."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._buffers: dict[Hashable, list[_Buffers]] = {}

    def to_host(self, key: Hashable, tensors: Sequence[Tensor]) -> HostCopy:
        """Start to copy ``tensors`` to the host.

        What was launched on the current stream before is in the copy. What is launched afterwards may overtake it:
        call :meth:`HostCopy.fence` before changing the tensors in place. They may be freed at once.

        Args:
            key: whose pinned memory is used again.

        Raises:
            ValueError: the tensors are on several devices.
        """
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ValueError(f"copy of {key!r}: tensors on several devices: {', '.join(sorted(map(str, devices)))}")
        device = devices.pop() if devices else torch.device("cpu")
        if device.type == "cpu":
            return HostCopy(list(tensors))
        tensors = [tensor.detach() for tensor in tensors]
        if device.type != "cuda":
            return HostCopy([tensor.cpu() for tensor in tensors])
        side = self._stream(device)
        side.wait_stream(torch.cuda.current_stream(device))  # an event: the host does not wait
        buffers = self._next_buffers(key, tensors)
        with torch.cuda.stream(side):
            for buffer, tensor in zip(buffers.tensors, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
                tensor.record_stream(side)  # freed, its memory is given out again only after the copy
            done = side.record_event()
        return HostCopy(buffers.tensors, device, done, buffers)

    def to_device(self, tensors: Sequence[Tensor], device: torch.device) -> DeviceCopy:
        """Start to copy CPU tensors to a device; :meth:`DeviceCopy.use` gives them.

        They are copied to pinned memory before this returns. Tensors that are pinned already are read in place: they
        must not change before the copy has ended.

        Raises:
            ValueError: a tensor is not on the CPU.
        """
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"copy to {device}: a tensor of shape {tuple(tensor.shape)} is on {tensor.device}")
        if device.type != "cuda":
            return DeviceCopy([tensor.to(device) for tensor in tensors])
        side = self._stream(device)
        with torch.cuda.stream(side):
            # torch's cache of pinned memory keeps each piece until the copy that reads it has ended
            arrived = [tensor.detach().pin_memory().to(side.device, non_blocking=True) for tensor in tensors]
            done = side.record_event()
        return DeviceCopy(arrived, done)

    def forget(self, key: Hashable) -> None:
        """Give the pinned memory of a key back."""
        self._buffers.pop(key, None)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def _next_buffers(self, key: Hashable, tensors: Sequence[Tensor]) -> _Buffers:
        """The memory used longest ago, or new one where the tensors' shapes have changed.

        A copy that still runs into it is on the same stream, so it ends first.
        """
        slots = self._buffers.setdefault(key, [])
        buffers = slots.pop(0) if len(slots) == _BUFFERS else None
        if buffers is None or not buffers.fit(tensors):  # of the same strides, so that a copy is one transfer
            buffers = _Buffers([torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors])
        buffers.uses += 1
        slots.append(buffers)
        return buffers


def _ended(event: torch.cuda.Event | None) -> bool:
    return event is None or bool(event.query())  # type: ignore[no-untyped-call]
