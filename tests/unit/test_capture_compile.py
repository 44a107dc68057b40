"""A compiled model is recorded as the same model is without, whenever which of the two comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
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


class Gate(nn.Module):
    """Saves what neither goes in nor comes out: of that a compiled graph is freed by its first backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() * x.tanh().exp()


def gated() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Gate(), nn.Linear(6, 3), Gate())


@pytest.mark.parametrize("order", ["recorder first", "called first"])
def test_outputs_of_a_compiled_model_are_differentiated_too(order: str) -> None:
    """And then the loss: what is compiled has to keep its graph."""
    nets = [gated() for _ in range(2)]
    plain = Recorder(nets[0], fisher="ggn")
    step(nets[0])
    functorch_config.donated_buffer = True  # torch's default
    recorder = Recorder(nets[1], fisher="ggn") if order == "recorder first" else None
    model = torch.compile(nets[1], backend="aot_eager")
    if order == "called first":
        step(model)
    recorder = recorder or Recorder(model, fisher="ggn")
    step(model)
    found = recorder.factors()
    assert recorder.examples == 5 and len(found) == 2
    for name, factors in plain.factors().items():
        torch.testing.assert_close(found[name], factors)


def test_what_cannot_be_differentiated_twice_says_what_to_do() -> None:
    net = gated()
    recorder = Recorder(net, fisher="mc")
    functorch_config.donated_buffer = True
    try:
        with pytest.raises(RuntimeError, match="donated_buffer = False before the model is compiled"):
            step(torch.compile(net, backend="aot_eager"))
    finally:
        functorch_config.donated_buffer = False
        recorder.close()
