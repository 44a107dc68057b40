"""A compiled model is recorded as the same model is without, whenever which of the two comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_soo.capture.recorder import Recorder


class Net(nn.Module):
    def __init__(self, attention: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True))
        self.attention = nn.MultiheadAttention(6, 2) if attention else None
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.attention is not None:
            x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1))
    model(x).sin().mean().backward()


def compiled_whole(net: Net, backend: str) -> tuple[Any, Any]:
    model = torch.compile(net, backend=backend)
    return model, model


def compiled_in_place(net: Net, backend: str) -> tuple[Any, Any]:
    net.compile(backend=backend)
    return net, net


def compiled_function(net: Net, backend: str) -> tuple[Any, Any]:
    return torch.compile(lambda x: net(x), backend=backend), net  # the recorder cannot see that it is


CASES = [
    (compiled_whole, "recorder first", "eager", False),
    (compiled_whole, "recorder first", "aot_eager", True),
    (compiled_whole, "compiled first", "eager", False),
    (compiled_whole, "called first", "eager", True),
    (compiled_in_place, "called first", "eager", False),
    (compiled_function, "called first", "eager", False),
]


@pytest.mark.parametrize(("compiled", "order", "backend", "attention"), CASES)
def test_factors_are_those_of_the_model_as_it_is(compiled: Any, order: str, backend: str, attention: bool) -> None:
    net = Net(attention)
    plain = Recorder(net)
    step(net)
    expected = plain.factors()
    plain.close()
    net = Net(attention)
    recorder = Recorder(net) if order == "recorder first" else None
    model, seen = compiled(net, backend)
    if order == "called first":
        step(model)
    recorder = recorder or Recorder(seen)
    for _ in range(2):
        recorder.clear()
        step(model)
    found = recorder.factors()
    assert recorder.examples == 5 and set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    recorder.close()
    recorder.clear()
    step(model)
    assert recorder.factors() == {}
