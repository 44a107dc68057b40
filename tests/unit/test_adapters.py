"""What adapters refuse, by name; what DeepSpeed's links say, read without DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_soo import Shampoo
from lightning_soo.placement.adapters import zero
from lightning_soo.placement.fragments import Fragment


class PipelineEngine(nn.Module):
    pass


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        ({"swap_optimizer": True}, None, "NVMe offload"),
        ({"zero_hpz_partition_size": 2}, None, "zero_hpz_partition_size"),
        ({"has_moe_layers": True}, None, "mixture of experts"),
        ({}, PipelineEngine(), "pipeline parallelism"),
        ({"partial_offload": 0.5, "offload_optimizer": True}, None, "twin-flow offload"),
    ],
)
def test_what_moves_state_elsewhere_is_named(settings: dict[str, Any], model: nn.Module | None, message: str) -> None:
    with pytest.raises(TypeError, match=f"{message}.*switch it off"):
        zero._refuse(SimpleNamespace(**settings), model, "SomeZeroOptimizer")


def test_mics_is_named() -> None:
    with pytest.raises(TypeError, match="MiCS is not supported with DeepSpeed's MiCS_Optimizer"):
        zero._refuse(SimpleNamespace(), None, "MiCS_Optimizer")


def test_parameters_of_an_engine_that_was_not_given_say_what_to_do() -> None:
    net = nn.Linear(4, 4)
    net.weight.ds_id = 3
    optimizer = Shampoo(net.parameters())
    with pytest.raises(TypeError, match=r"'group0.0' belongs to DeepSpeed: call optimizer.attach\(engine\)"):
        optimizer.attach()


def test_gradients_of_later_groups_are_found_where_deepspeed_keeps_them() -> None:
    """Two groups, of which the first is being stepped; pieces end to end, padding at the end."""
    flats = [torch.zeros(4), torch.zeros(8)]
    fragments = [
        Fragment(name="a", shape=(2, 2), start=0, stop=4, tensor=flats[0]),
        Fragment(name="b", shape=(5,), start=2, stop=5, tensor=flats[1], offset=0),
        Fragment(name="c", shape=(2, 2), start=0, stop=4, tensor=flats[1], offset=3),
    ]
    pieces = [torch.arange(3.0), torch.arange(4.0).view(2, 2) + 10, torch.zeros(1)]
    engine = SimpleNamespace(averaged_gradients={1: pieces}, loss_scale=8.0)
    found, scale = zero._pending(engine, flats, fragments, [0, 1, 1])()
    assert scale == 8.0 and found.keys() == {1, 2}
    assert found[1].tolist() == [0.0, 1.0, 2.0] and found[2].tolist() == [10.0, 11.0, 12.0, 13.0]
    engine.averaged_gradients = {}
    flats[1].grad = torch.arange(8.0)
    offloaded, _ = zero._pending(engine, flats, fragments, [0, 1, 1])()
    assert offloaded[1].tolist() == [0.0, 1.0, 2.0] and offloaded[2].flatten().tolist() == [3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("shape", "start", "stop", "offset", "values"),
    [
        ((6,), 0, 2, 4, [4.0, 5.0]),  # a part of a bias, in a partition that happens to be as long as the bias
        ((6,), 2, 6, 0, [0.0, 1.0, 2.0, 3.0]),
        ((6,), 0, 6, 0, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        ((2, 2), 0, 4, 1, [[1.0, 2.0], [3.0, 4.0]]),
        ((6,), 0, 0, 0, []),
    ],
)
def test_a_fragment_finds_its_part_of_a_flat_partition(
    shape: tuple[int, ...], start: int, stop: int, offset: int, values: list[Any]
) -> None:
    flat = torch.arange(6.0)
    local = Fragment(name="a", shape=shape, start=start, stop=stop, tensor=flat, offset=offset).local(flat)
    assert local.tolist() == values
    local.fill_(-1.0)  # it is a view
    assert int((flat < 0).sum()) == local.numel()
