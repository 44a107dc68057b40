"""Copies beside training: nothing at all on a CPU; on a GPU the values of the moment, without the host waiting."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_soo.refresh.device_copies import DeviceCopies

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = torch.device("cuda")
# cycles that keep a stream busy far longer than the host needs for a few launches
LONG = 1_000_000_000


def matrices(value: float, device: torch.device) -> list[torch.Tensor]:
    return [torch.full((300, 300), value, device=device), torch.full((40,), value, dtype=torch.float64, device=device)]


def test_on_a_cpu_the_tensors_themselves_come_back() -> None:
    copies, tensors = DeviceCopies(), matrices(1.0, torch.device("cpu"))
    for _ in range(3):
        host, device = copies.to_host("a", tensors), copies.to_device(tensors, torch.device("cpu"))
        assert host.ready() and device.ready()
        host.fence()
        for found in (host.wait(), device.use()):
            assert len(found) == 2 and all(a is b for a, b in zip(found, tensors, strict=True))
    copies.forget("a")
    copies.forget("never seen")
    assert copies.to_host("a", []).wait() == [] and copies.to_device([], torch.device("cpu")).use() == []


def test_tensors_in_several_places_are_refused() -> None:
    here, elsewhere = torch.zeros(2, 3), torch.zeros(4, 5, device="meta")
    with pytest.raises(ValueError, match=r"'the block'.*cpu, meta"):
        DeviceCopies().to_host("the block", [here, elsewhere])
    with pytest.raises(ValueError, match=r"\(4, 5\) is on meta"):
        DeviceCopies().to_device([here, elsewhere], torch.device("cpu"))


@pytest.fixture
def copies() -> Iterator[DeviceCopies]:
    """Their memory exists (getting new may wait); afterwards whatever makes the host wait for the device raises."""
    found = DeviceCopies()
    for _ in range(2):
        found.to_host("a", matrices(0.0, GPU)).wait()
        found.to_device(matrices(0.0, torch.device("cpu")), GPU).use()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield found
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@cuda
def test_a_copy_to_the_host_holds_the_values_of_its_start(copies: DeviceCopies) -> None:
    """Launched while the stream is busy: neither earlier nor later writes are mixed up, and the host runs ahead."""
    tensors = matrices(1.0, GPU)
    torch.cuda._sleep(LONG)
    for tensor in tensors:
        tensor.fill_(2.0)
    copy = copies.to_host("a", tensors)
    copy.fence()
    for tensor in tensors:
        tensor.fill_(3.0)
    assert not copy.ready()  # the stream still sleeps: nothing above has waited for it
    found = copy.wait()
    assert copy.ready()
    for tensor, original in zip(found, tensors, strict=True):
        assert tensor.device.type == "cpu" and tensor.is_pinned() and tensor.dtype == original.dtype
        assert torch.equal(tensor, torch.full_like(tensor, 2.0))


@cuda
def test_the_fence_holds_writers_back_and_nothing_else(copies: DeviceCopies) -> None:
    """The side stream is held up here: without the fence the write would overtake the copy."""
    tensors = matrices(1.0, GPU)
    side = copies._stream(GPU)
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
    copy = copies.to_host("a", tensors)
    copy.fence()
    for tensor in tensors:
        tensor.fill_(2.0)
    assert not copy.ready()
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in copy.wait())


@cuda
def test_freed_tensors_are_copied_before_their_memory_is_used_again(copies: DeviceCopies) -> None:
    tensors = matrices(1.0, GPU)
    with torch.cuda.stream(copies._stream(GPU)):
        torch.cuda._sleep(LONG)
    copy = copies.to_host("a", tensors)
    del tensors
    others = [matrices(5.0, GPU) for _ in range(20)]  # would be written to the same memory at once
    assert len(others) == 20
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in copy.wait())


@cuda
def test_pinned_memory_is_used_in_turn(copies: DeviceCopies) -> None:
    first = copies.to_host("a", matrices(1.0, GPU))
    one = first.wait()
    second = copies.to_host("a", matrices(2.0, GPU))
    other = copies.to_host("b", matrices(9.0, GPU))
    two = second.wait()
    assert torch.equal(one[0], torch.ones_like(one[0]))  # not overwritten by the next copy
    third = copies.to_host("a", matrices(3.0, GPU))
    three = third.wait()
    assert three[0].data_ptr() == one[0].data_ptr() != two[0].data_ptr()
    assert [tensor[0].item() for tensor in (three[1], two[1], other.wait()[1])] == [3.0, 2.0, 9.0]
    with pytest.raises(RuntimeError, match="overwritten"):
        first.wait()
    assert copies.to_host("a", [torch.ones(7, device=GPU)]).wait()[0].shape == (7,)  # other shapes, other memory


@cuda
def test_a_copy_to_the_device_arrives_before_it_is_used(copies: DeviceCopies) -> None:
    """The side stream is held up, so a reader that did not wait for it would find something else."""
    sources = matrices(4.0, torch.device("cpu"))
    with torch.cuda.stream(copies._stream(GPU)):
        torch.cuda._sleep(LONG)
    copy = copies.to_device(sources, GPU)
    for source in sources:
        source.fill_(-1.0)  # pinned memory has the values already
    assert not copy.ready()
    sums = [2.0 * tensor for tensor in copy.use()]
    assert not copy.ready()
    torch.cuda.set_sync_debug_mode("default")
    for found in sums:
        assert found.device.type == "cuda" and torch.equal(found.cpu(), torch.full(found.shape, 8.0, dtype=found.dtype))
