"""Ranks that wait for each other, rows 18 and 19: what a rank of three sees of those that do not come, or differ."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import RANKS, Found, linear, refusal
from torch import nn

from lightning_soo import Shampoo
from lightning_soo.transport import Transport
from lightning_soo.transport.notes import NOTE


def set_gradients(model: nn.Module, step: int) -> None:
    """The same on every rank, without a collective of an engine's."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def steps_of(optimizer: Any, model: nn.Module, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(model, step)
        optimizer.step()


# row 18


@contextmanager
def own_group(timeout: float = 10.0) -> Iterator[Any]:
    """Collectives are left unfinished in it, which must not be those of other cases."""
    yield dist.new_group(timeout=timedelta(seconds=timeout))
    dist.barrier()


class Handle:
    """A collective that is over by the second wait at the latest."""

    def __init__(self, late: bool) -> None:
        self.late, self.waits = late, 0

    def wait(self, timeout: timedelta) -> None:
        self.waits += 1
        if self.late and self.waits == 1:
            raise RuntimeError("Operation timed out!")

    def is_completed(self) -> bool:
        return False


def waits_of(transport: Transport, *, late: bool) -> Found:
    """How often one wait for three collectives looks at them, and what it writes."""
    assert transport._waiting is not None
    handles, written = [Handle(late) for _ in range(3)], []
    write, NOTE.write = NOTE.write, lambda group, text: written.append(text)  # type: ignore[method-assign]
    transport._waiting.for_all(handles, "the roots")
    NOTE.write = write  # type: ignore[method-assign]
    return {"waits": [handle.waits for handle in handles], "written": written}


def replicated(group: Any, **given: Any) -> tuple[nn.Module, Any]:
    model = linear()
    settings = {"collective_timeout": 2.0, "workers": "inline", "precondition_frequency": 4, "refresh_delay": 0}
    optimizer = Shampoo(model, **{**settings, "stagger": False, "start_preconditioning_step": 4, **given})
    optimizer.attach(process_group=group)
    return model, optimizer


def a_rank_does_not_come(rank: int) -> Found:
    """Two wait for one that sleeps, and by the group's own timeout; for one in another optimizer's step; for a root."""
    found: Found = {}
    with own_group() as group:
        model, optimizer = replicated(group)
        optimizer._transport.calls.clear()  # what attaching took: which products are fast is agreed on
        steps_of(optimizer, model, 0, 3)
        found["calls"] = dict(optimizer._transport.calls)
        found["in time"] = waits_of(optimizer._transport, late=False)
        found["late"] = waits_of(optimizer._transport, late=True)
        begin = time.monotonic()
        if rank != 1:
            found["asleep"] = refusal(lambda: steps_of(optimizer, model, 3, 4))
            found["seconds"] = time.monotonic() - begin
    with own_group(2.0) as group:
        model, optimizer = replicated(group, collective_timeout=None)
        if rank != 1:
            found["of the group"] = refusal(lambda: steps_of(optimizer, model, 0, 1))
    with own_group() as group, own_group() as other:
        model, optimizer = replicated(group)
        model_of_other, of_other = replicated(other)
        if rank == 2:
            found["elsewhere"] = refusal(lambda: steps_of(of_other, model_of_other, 0, 1))
        else:
            found["elsewhere"] = refusal(lambda: steps_of(optimizer, model, 0, 1))
    with own_group() as group:
        model, optimizer = replicated(group)
        background = optimizer._refresher.background
        if rank == 1:
            result = background.result
            background.result = lambda key: time.sleep(5.0) or result(key)
        found["root"] = refusal(lambda: steps_of(optimizer, model, 0, 4))
    bad = [{"collective_timeout": 3e3}, {"collective_timeout": 20.0, "workers": {"kind": "thread", "deadline": 7}}]
    found["refused"] = [refusal(Shampoo(linear(), **given).attach) for given in bad]
    found["deadline"] = Shampoo(linear()).options.workers.within(20.0).deadline
    return found


# row 19


def sizes_differ_on_one_rank(rank: int) -> Found:
    model = linear()
    optimizer = Shampoo(model, workers="inline")
    optimizer.attach()
    steps_of(optimizer, model, 0, 1)
    extra = nn.Parameter(torch.zeros(6 if rank == 2 else 5, 4, dtype=torch.float64))
    optimizer.add_param_group({"params": [("extra", extra)]})
    transport = Transport()
    one = torch.zeros(rank + 5)
    found: Found = {
        "attach": refusal(Shampoo(linear(5 if rank == 1 else 4), workers="inline").attach),
        "later": refusal(lambda: steps_of(optimizer, model, 0, 1)),
        "exchange": refusal(lambda: transport.start_exchange(one, [1] * RANKS, [1] * RANKS, "the statistics")),
        "broadcast": refusal(
            lambda: transport.start_broadcast_from_owners([9] * RANKS, one.view(torch.uint8), "the roots")
        ),
    }
    return {**found, "calls": dict(transport.calls)}


def a_rank_has_gone(rank: int) -> Found:
    """The last case: one rank ends while the others wait for it."""
    model, optimizer = replicated(None, collective_timeout=10.0)
    steps_of(optimizer, model, 0, 2)
    dist.barrier()
    if rank != 2:
        return {"text": refusal(lambda: steps_of(optimizer, model, 2, 3))}
    time.sleep(1.0)
    return {}
