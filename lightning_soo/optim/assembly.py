"""Brings units that no single rank holds to their homes, and what comes of them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_soo.optim.exchange_buffers import ExchangeBuffers
from lightning_soo.optim.members import Member
from lightning_soo.placement.boxes import Box, slices, volume, within
from lightning_soo.placement.exchange import Bucket, Traveller
from lightning_soo.placement.plan import Plan
from lightning_soo.transport import Arriving, Transport

Source = Callable[[Member], Tensor | None]


class Assembly:
    """Walks through the plan's buckets; the next one is under way while the caller works on one.

    Which buckets, and every size, comes from the plan and from flags that all ranks share.
    """

    def __init__(self, plan: Plan, members: Sequence[Member], transport: Transport) -> None:
        self._buckets = plan.buckets
        self._members = members
        self.transport = transport
        self._returning: tuple[Bucket, Arriving] | None = None
        self._buffers = ExchangeBuffers()
        self._layouts: dict[tuple[int, bool], list[tuple[Traveller, Box, int]]] = {}

    def arrive(
        self, part: int, wanted: Callable[[Member], bool], sources: Sequence[Source]
    ) -> Iterator[tuple[Any, ...]]:
        """Send the first bucket, and return what yields each bucket and, for each source, the units that have their
        home here, assembled, by key. What is done between the two happens while the first bucket is under way.

        Args:
            wanted: whether a member's units are needed; the same on all ranks. A bucket without any is left out.
            sources: a member's local elements to send, contiguous; None sends zeros.
        """
        buckets = enumerate(
            [
                bucket
                for bucket in self._buckets.get(part, ())
                if any(wanted(self._members[traveller.parameter]) for traveller in bucket.travellers)
            ]
        )
        return self._arriving(self._next(buckets, sources), buckets, sources)

    def _arriving(
        self,
        under_way: tuple[Bucket, list[Arriving]] | None,
        buckets: Iterator[tuple[int, Bucket]],
        sources: Sequence[Source],
    ) -> Iterator[tuple[Any, ...]]:
        while under_way is not None:
            following = self._next(buckets, sources)
            yield self._assembled(*under_way)
            under_way = following

    def _next(
        self, buckets: Iterator[tuple[int, Bucket]], sources: Sequence[Source]
    ) -> tuple[Bucket, list[Arriving]] | None:
        number, bucket = next(buckets, (0, None))
        if bucket is None:
            return None
        # two are under way at a time
        return bucket, [self._send(bucket, source, f"{number % 2}, {each}") for each, source in enumerate(sources)]

    def _assembled(self, bucket: Bucket, arriving: Sequence[Arriving]) -> tuple[Any, ...]:
        return bucket, *(self._assemble(bucket, each) for each in arriving)

    def give_back(self, bucket: Bucket, results: Mapping[str, Tensor], target: Callable[[Member], Tensor]) -> None:
        """Send what was made of a bucket's units to the ranks that hold them, and take what came of the last bucket.

        Args:
            results: by key, of the units whose home is here; zeros for those left out.
            target: a member's local elements to write to, contiguous.
        """
        self.finish(target)
        place = self.transport.rank
        sent, received = bucket.received(place), bucket.sent(place)
        flat = self._buffer(bucket, "directions sent", sent)
        for traveller, box, start in self._layout(bucket, home=place):
            result, piece = results.get(traveller.key), flat[start : start + volume(box)]
            if result is None:
                piece.zero_()
            else:
                found = result[slices(within(box, traveller.box))]
                piece.view(found.shape).copy_(found)
        into = self._buffer(bucket, "directions received", received)
        arriving = self.transport.start_exchange(flat, sent, received, "the directions of cut blocks", into)
        self._returning = bucket, arriving

    def finish(self, target: Callable[[Member], Tensor]) -> None:
        """Wait for what was given back last."""
        if self._returning is None:
            return
        bucket, arriving = self._returning
        self._returning = None
        flat = arriving.wait()
        for traveller, box, start in self._layout(bucket, sender=self.transport.rank):
            member = self._members[traveller.parameter]
            if member.magnitude > 0 and member.is_ready:
                view = member.view(target(member), box)
                view.copy_(flat[start : start + volume(box)].view(view.shape))

    def _send(self, bucket: Bucket, source: Source, which: str) -> Arriving:
        place = self.transport.rank
        sent, received = bucket.sent(place), bucket.received(place)
        flat = self._buffer(bucket, f"sent {which}", sent)
        for traveller, box, start in self._layout(bucket, sender=place):
            member = self._members[traveller.parameter]
            local, piece = source(member), flat[start : start + volume(box)]
            if local is None:
                piece.zero_()
            else:
                view = member.view(local, box)
                piece.view(view.shape).copy_(view)
        into = self._buffer(bucket, f"received {which}", received)
        return self.transport.start_exchange(flat, sent, received, "the gradients of cut blocks", into)

    def _assemble(self, bucket: Bucket, arriving: Arriving) -> dict[str, Tensor]:
        flat = arriving.wait()
        found: dict[str, Tensor] = {}
        for traveller, box, start in self._layout(bucket, home=self.transport.rank):
            if traveller.key not in found:
                found[traveller.key] = flat.new_empty([stop - start for start, stop in traveller.box])
            piece = found[traveller.key][slices(within(box, traveller.box))]
            piece.copy_(flat[start : start + volume(box)].view(piece.shape))
        return found

    def _layout(
        self, bucket: Bucket, *, sender: int | None = None, home: int | None = None
    ) -> list[tuple[Traveller, Box, int]]:
        """Boxes and their positions in one rank's buffer: ordered by the other rank, then by unit.

        Exactly one of ``sender`` (its buffer to the homes) and ``home`` (the buffer that arrives there) is given.
        """
        key = id(bucket), sender is None
        if key in self._layouts:
            return self._layouts[key]
        found, start = [], 0
        for other in range(self.transport.size):
            for traveller in bucket.travellers:
                if traveller.home != (other if home is None else home):
                    continue
                for box in traveller.parts.get(other if sender is None else sender, ()):
                    found.append((traveller, box, start))
                    start += volume(box)
        self._layouts[key] = found
        return found

    def _buffer(self, bucket: Bucket, purpose: str, sizes: Sequence[int]) -> Tensor:
        device = self._members[bucket.travellers[0].parameter].parameter().device
        return self._buffers.take(purpose, sum(sizes), bucket.dtype, device)
