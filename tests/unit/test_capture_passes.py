"""What a pass is, however the user calls the model: per-example gradients by autograd say what must come out."""

from __future__ import annotations

import copy
import io
import pickle
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from lightning_soo.capture.linear import LinearRule
from lightning_soo.capture.recorder import Recorder
from lightning_soo.capture.registry import LayerPart, Record, register

Factors = dict[str, tuple[Tensor, Tensor]]


class Patched(nn.Module):
    """Its encoder sees patches: the rows of an inner module are not the examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.decoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.loss = nn.CrossEntropyLoss()
        self.double()

    def training_step(self, x: Tensor, y: Tensor) -> Tensor:
        """Calls its modules, and is not called itself."""
        return self.loss(self.decoder(self.encoder(x).mean(1)), y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.training_step(x, y)


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def expected(net: Patched, x: Tensor, y: Tensor, uses: int = 1) -> Factors:
    """Written out: rows and gradients of every linear layer, from a graph made by hand."""
    layers = {"encoder.0": net.encoder[0], "decoder.0": net.decoder[0], "decoder.2": net.decoder[2]}
    rows, outputs = {}, {}

    def linear(name: str, value: Tensor) -> Tensor:
        rows[name] = torch.cat([value, torch.ones(*value.shape[:-1], 1)], -1).detach().flatten(0, -2)
        outputs[name] = nn.functional.linear(value, layers[name].weight, layers[name].bias)
        return outputs[name]

    hidden = linear("encoder.0", x).tanh().mean(1)
    logits = linear("decoder.2", linear("decoder.0", hidden).tanh())
    loss = nn.functional.cross_entropy(logits, y, reduction="sum")  # of single examples
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    found = {}
    for name in layers:
        gradient = gradients[name].flatten(0, -2)
        found[name] = (rows[name].T @ rows[name] / len(rows[name]), uses * gradient.T @ gradient / len(x))
    return found


def assert_same(found: Any, wanted: Factors) -> None:
    assert set(found) == set(wanted)
    for name, (inputs, gradients) in wanted.items():
        torch.testing.assert_close(found[name][0][0], inputs, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found[name][1], gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("called", ["model", "step", "encoder and decoder", "layer by layer"])
def test_whatever_is_called_has_the_examples_of_the_first_call(called: str) -> None:
    net, (x, y) = Patched(), batch()
    recorder = Recorder(net)
    if called == "model":
        loss = net(x, y)
    elif called == "step":
        loss = net.training_step(x, y)
    elif called == "encoder and decoder":
        loss = nn.functional.cross_entropy(net.decoder(net.encoder(x).mean(1)), y)
    else:
        value = net.encoder[1](net.encoder[0](x)).mean(1)
        loss = nn.functional.cross_entropy(net.decoder[2](net.decoder[1](net.decoder[0](value))), y)
    loss.backward()
    assert recorder.examples == 8
    assert_same(recorder.factors(), expected(net, x, y))


@dataclass
class Batch:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("kind", [dict, UserDict, Batch, SimpleNamespace])
def test_examples_are_found_in_any_kind_of_batch(kind: Any) -> None:
    class Wrapped(Patched):
        def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
            of = batch if isinstance(batch, (dict, UserDict)) else vars(batch)
            return self.training_step(of["x"], of["y"])

    net, (x, y) = Wrapped(), batch()
    recorder = Recorder(net)
    net(kind(x=x, y=y)).backward()
    assert recorder.examples == 8
    assert_same(recorder.factors(), expected(net, x, y))


@pytest.mark.parametrize("create_graph", [False, True])
def test_derivatives_by_inputs_are_no_gradients_of_the_loss(create_graph: bool) -> None:
    net, (x, y) = Patched(), batch()
    recorder = Recorder(net)
    seen = x.clone().requires_grad_()
    hidden = net.decoder(net.encoder(seen).mean(1))
    (slope,) = torch.autograd.grad(hidden.sum(), seen, create_graph=create_graph, retain_graph=True)
    nn.functional.cross_entropy(hidden, y).backward()
    assert slope.abs().sum() > 0 and recorder.examples == 8
    assert_same(recorder.factors(), expected(net, x, y))
    recorder.clear()
    torch.autograd.grad(net(x, y), list(net.parameters()))  # these are
    assert_same(recorder.factors(), expected(net, x, y))


@pytest.mark.parametrize("called", ["forward", "training_step"])
def test_every_backward_pass_ends_a_pass(called: str) -> None:
    net, (x, y) = Patched(), batch()
    recorder = Recorder(net)
    for part, label in zip(x.split(5), y.split(5), strict=True):  # five examples and three
        (getattr(net, called)(part, label) * len(part) / 8).backward()
    assert recorder.examples == 8
    found = recorder.factors()
    for name, (inputs, _) in expected(net, x, y).items():
        torch.testing.assert_close(found[name][0][0], inputs)
    recorder.clear()
    for part, label in zip(x.chunk(2), y.chunk(2), strict=True):
        (getattr(net, called)(part, label) / 2).backward()
    assert_same(recorder.factors(divisor=2), expected(net, x, y))


def test_two_views_before_one_backward_are_one_pass() -> None:
    net, (x, y) = Patched(), batch()
    recorder = Recorder(net)
    (net(x, y) + net(x, y)).backward()
    assert recorder.examples == 8
    assert_same(recorder.factors(), expected(net, x, y, uses=2))


def test_passes_that_are_not_differentiated_are_not_counted() -> None:
    net, (x, y) = Patched(), batch()
    recorder = Recorder(net)
    metric = net(*batch(5))  # with gradients, dropped before the one that trains
    del metric
    net(x, y).backward()
    with torch.no_grad():
        net.eval()(*batch(5))
    net.train()(*batch(3))
    net.training_step(x, y).backward()
    with torch.no_grad():
        net(*batch(4))
    assert recorder.examples == 16
    wanted = expected(net, x, y)
    assert_same(recorder.factors(), wanted)
    kept = net(*batch(5))
    recorder.clear()  # the step is over
    net(x, y).backward()
    assert kept.requires_grad and recorder.examples == 8
    assert_same(recorder.factors(), wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_called_again_in_the_backward_pass_is_counted_once(reentrant: bool) -> None:
    net, (x, y) = Patched(), batch()
    recorder = Recorder(net)
    calls = []
    inside = recorder.layers[0].rule.inputs
    recorder.layers[0].rule.inputs = lambda *a: (calls.append(a[1]), inside(*a))[1]  # type: ignore[method-assign]
    try:
        for _ in range(2):
            recorder.clear()
            hidden = checkpoint(net.encoder, x.clone().requires_grad_(), use_reentrant=reentrant).mean(1)
            logits = checkpoint(net.decoder, hidden, use_reentrant=reentrant)
            nn.functional.cross_entropy(logits, y).backward()
            assert recorder.examples == 8
            assert_same(recorder.factors(), expected(net, x, y))
    finally:
        del recorder.layers[0].rule.inputs
    assert len(calls) == 6  # and its statistics are formed once


def saved(net: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Watched(nn.Linear):
    pass


class WatchedRule(LinearRule):
    """Hangs a function of its own."""

    kinds = (Watched,)

    def watch(self, module: nn.Module, record: Record) -> list[RemovableHandle]:
        def forward_hook(module: nn.Module, positional: Any, output: Tensor) -> None:
            record(positional[0], output, None)

        return [module.register_forward_hook(forward_hook)]

    def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        return super().inputs(module, part, values, batch)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved])
def test_a_copy_records_nothing(copied: Any) -> None:
    register(WatchedRule())
    net = nn.Sequential(Watched(4, 3), nn.MultiheadAttention(3, 1), nn.Linear(3, 2)).double()

    def loss(net: nn.Sequential, x: Tensor) -> Tensor:
        hidden = net[0](x)
        return net[2](net[1](hidden, hidden, hidden)[0]).square().mean()

    recorder = Recorder(net)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    loss(net, x).backward()
    before = copy.deepcopy(recorder.factors())
    other = copied(net)
    loss(other, x).backward()
    torch.testing.assert_close(loss(other, x), loss(net, x))
    assert recorder.examples == 5 and len(before) == 6
    for name, factors in recorder.factors().items():
        torch.testing.assert_close(factors, before[name])
    own = Recorder(other)
    loss(other, x).backward()
    assert own.examples == 5 and recorder.examples == 5
    for name, factors in own.factors().items():
        torch.testing.assert_close(factors, before[name])


def test_a_closed_recorder_leaves_no_hooks() -> None:
    net = Patched()
    Recorder(net).close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
