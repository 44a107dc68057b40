"""Captured factors: golden values, gradients of single examples, and everything that must not change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_soo.capture import convolution, linear
from lightning_soo.capture.factors import Statistics
from lightning_soo.capture.recorder import Recorder, find_layers
from lightning_soo.capture.registry import LayerPart, find_rule, register

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "kfac_mlp.npz")


def golden_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    net.load_state_dict({name: torch.from_numpy(GOLDEN[f"param/{name}"].copy()) for name in net.state_dict()})
    return net


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["emp", "type2"])
def test_golden_factors(fisher: str, approximation: str) -> None:
    net = golden_net()
    recorder = Recorder(net, approximation=approximation)
    logits, labels = net(torch.from_numpy(GOLDEN["X"].copy())), torch.from_numpy(GOLDEN["y"].copy())
    if fisher == "emp":
        nn.functional.cross_entropy(logits, labels).backward()
    else:  # columns of a square root of the loss's Hessian, sqrt(p_c) (e_c - p)
        probabilities = logits.detach().softmax(1)
        for column in range(5):
            root = probabilities[:, column : column + 1].sqrt() * (torch.eye(5).double()[column] - probabilities)
            logits.backward(root / len(logits), retain_graph=True)
    for name, ((inputs,), gradients) in recorder.factors().items():
        prefix = f"curvlinops/{fisher}/{approximation}/{name}/"
        np.testing.assert_allclose(inputs.numpy(), GOLDEN[prefix + "A_joint"], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(gradients.numpy(), GOLDEN[prefix + "G"], rtol=1e-8, atol=1e-12)
    assert set(recorder.factors()) == {"0", "2", "4"}


def matrix_of(part: LayerPart, module: nn.Module, name: str, gradient: Tensor) -> Tensor:
    """A gradient of the weight as ``(outputs, inputs)`` of the part."""
    gradient = gradient.T if part.transposed else gradient.flatten(1)
    return gradient[part.rows[0] : part.rows[1]]


CONVOLUTIONS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3}, (4, 9)),
    (nn.Conv2d, {"in_channels": 3, "out_channels": 5, "kernel_size": (3, 2), "stride": (2, 1), "bias": False},
     (3, 8, 7)),
    (nn.Conv2d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "padding": 1}, (4, 5, 6)),
    (nn.Conv2d, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4, "dilation": 2}, (4, 9, 9)),
    (nn.Conv2d, {"in_channels": 2, "out_channels": 3, "kernel_size": (4, 3), "padding": "same"}, (2, 6, 5)),
    (nn.Conv2d, {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": "valid"}, (2, 6, 5)),
    (nn.Conv2d, {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
     (2, 6, 5)),
    (nn.Conv2d, {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
     (2, 6, 5)),
    (nn.Conv3d, {"in_channels": 2, "out_channels": 4, "kernel_size": (2, 3, 1), "padding": (1, 0, 1), "groups": 2},
     (2, 4, 5, 3)),
    (nn.Linear, {"in_features": 5, "out_features": 3}, (4, 5)),
    (nn.Linear, {"in_features": 5, "out_features": 3, "bias": False}, (5,)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "shape"), CONVOLUTIONS)
@pytest.mark.parametrize("contiguous", [True, False])
def test_rows_make_the_gradient_of_every_example(
    kind: type[nn.Module], options: dict[str, Any], shape: tuple[int, ...], contiguous: bool
) -> None:
    """Sum over positions of ``g a^T`` is what autograd gives for each example alone: rows, order and padding agree."""
    torch.manual_seed(0)
    module = kind(**options).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    if not contiguous and x.ndim > 2:
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    output = module(x)
    output_gradient = torch.randn_like(output)
    rule = find_rule(module)
    assert rule is not None
    for part in rule.parts(module):
        inputs = rule.inputs(module, part, x, len(x))
        gradients = rule.gradients(module, part, output_gradient, len(x))
        assert inputs.shape[:2] == gradients.shape[:2] and inputs.shape[2] == part.inputs
        for index in range(len(x)):
            module.zero_grad()
            (module(x[index : index + 1]) * output_gradient[index : index + 1]).sum().backward()
            expected = matrix_of(part, module, "weight", module.weight.grad)
            torch.testing.assert_close(gradients[index].T @ inputs[index], expected)
            if part.bias is not None:
                torch.testing.assert_close(gradients[index].sum(0), module.bias.grad[part.rows[0] : part.rows[1]])


def test_convolutions_are_summed_a_few_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(3, 2, 3, padding=1).double()
    x = torch.randn(7, 3, 5, 5, dtype=torch.float64)
    rule = find_rule(module)
    assert rule is not None
    (part,) = rule.parts(module)
    rows = rule.inputs(module, part, x, 7)
    calls: list[int] = []
    monkeypatch.setattr(convolution, "PIECE", 2 * 75 * 9 * 8)  # two examples
    inside = convolution.patches
    monkeypatch.setattr(convolution, "patches", lambda *a, **b: (calls.append(len(a[0])), inside(*a, **b))[1])
    for approximation, expected in (("expand", rows.flatten(0, 1)), ("reduce", rows.mean(1))):
        (found,), count = rule.input_sums(module, part, x, 7, Statistics(approximation=approximation))
        assert count == len(expected)
        torch.testing.assert_close(found[:27, :27], expected.T @ expected)
        torch.testing.assert_close(found[27], torch.cat([expected.sum(0), torch.tensor([1.0 * count])]).double())
    assert calls == [2, 2, 2, 1] * 2


NORMALIZATIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.LayerNorm(5), (4, 5)),
    (nn.LayerNorm((4, 5), bias=False), (4, 5)),
    (nn.RMSNorm(5, eps=1e-3), (5,)),
    (nn.GroupNorm(2, 4), (4, 3, 3)),
    (nn.BatchNorm1d(4), (4,)),
    (nn.BatchNorm2d(4), (4, 3, 2)),
]


@pytest.mark.parametrize(("module", "shape"), NORMALIZATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_scales_and_shifts(module: nn.Module, shape: tuple[int, ...], training: bool) -> None:
    """The sum over examples of ``(scale, shift) (scale, shift)^T`` of what autograd gives for each output alone."""
    torch.manual_seed(0)
    module = module.double().train(training)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        module.running_mean.uniform_()
        module.running_var.uniform_(0.5, 2.0)
        module.momentum = 0.0  # what the test itself calls must not move them
    x = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    recorder = Recorder(module, batch_reduction="sum")
    output = module(x)
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    inputs, found = recorder.factors()[""]
    assert inputs == ()
    pairs = []
    for index in range(6):
        gradients = torch.autograd.grad((module(x) * weights)[index].sum(), list(module.parameters()))
        pairs.append(torch.stack([gradient.flatten() for gradient in gradients], -1))
    expected = torch.stack([pair[:, :, None] * pair[:, None, :] for pair in pairs]).mean(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padding", [None, 2])
def test_embeddings_count(padding: int | None) -> None:
    torch.manual_seed(0)
    module = nn.Embedding(7, 3, padding_idx=padding).double()
    tokens = torch.randint(0, 7, (4, 5))
    rule = find_rule(module)
    assert rule is not None
    (part,) = rule.parts(module)
    recorder = Recorder(module, batch_reduction="sum")
    output = module(tokens)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    inputs, rows = rule.inputs(module, part, tokens, 4), rule.gradients(module, part, gradient, 4)
    whole = torch.einsum("nto,nti->oi", rows, inputs)
    torch.testing.assert_close(whole, matrix_of(part, module, "weight", module.weight.grad))
    (found,), gradients = recorder.factors()[""]
    dense = inputs.flatten(0, 1)
    torch.testing.assert_close(torch.diag(found), dense.T @ dense / 20)
    torch.testing.assert_close(gradients, torch.einsum("nti,ntj->ij", rows, rows) / 4)
    assert find_layers(nn.Embedding(3, 2, max_norm=1.0))[1] == {
        "": "an embedding with max_norm, scale_grad_by_freq or sparse gradients"
    }


def test_a_weight_that_is_stored_the_other_way_round() -> None:
    transformers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    module = transformers.Conv1D(3, 5).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    recorder = Recorder(module, batch_reduction="sum")
    output = module(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    (layer,) = recorder.layers
    rows = layer.rule.inputs(module, layer.part, x, 2).flatten(0, 1)
    product = gradient.flatten(0, 1).T @ rows
    torch.testing.assert_close(product, matrix_of(layer.part, module, "weight", module.weight.grad))
    torch.testing.assert_close(recorder.factors()[""][0][0][:5, :5], rows.T @ rows / 8)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "memory", "three", "other widths"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_attention(kind: str, batch_first: bool, approximation: str) -> None:
    """Against the same attention written out with four linear layers, which are captured by themselves."""
    torch.manual_seed(0)
    widths = {"kdim": 5, "vdim": 7} if kind == "other widths" else {}
    module = nn.MultiheadAttention(6, 2, batch_first=batch_first, **widths).double()
    nn.init.normal_(module.in_proj_bias)

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            biases = module.in_proj_bias.chunk(3)
            packed = module.in_proj_weight
            weights = (
                packed.chunk(3)
                if packed is not None
                else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
            )
            for name, weight, bias in zip("qkv", weights, biases, strict=True):
                linear = nn.Linear(weight.shape[1], 6).double()
                linear.weight.data.copy_(weight)
                linear.bias.data.copy_(bias)
                setattr(self, name, linear)
            self.out = nn.Linear(6, 6).double()
            self.out.load_state_dict(module.out_proj.state_dict())

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            heads = [
                layer(x).unflatten(-1, (2, 3)).transpose(1, 2)
                for layer, x in zip((self.q, self.k, self.v), (query, key, value), strict=True)
            ]
            mixed = nn.functional.scaled_dot_product_attention(*heads)
            return self.out(mixed.transpose(1, 2).flatten(2))

    query = torch.randn(3, 4, 6, dtype=torch.float64)
    memory = torch.randn(3, 5, 6, dtype=torch.float64)
    arguments = {
        "self": (query, query, query),
        "memory": (query, memory, memory),
        "three": (query, memory, memory.sin()),
        "other widths": (query, memory[..., :5], torch.cat([memory, memory[..., :1]], -1)),
    }[kind]
    written = Written()
    expected = Recorder(written, approximation=approximation)
    output = written(*arguments)
    output.sin().mean().backward()
    if not batch_first:
        arguments = tuple(argument.transpose(0, 1) for argument in arguments)
        if kind == "self":
            arguments = (arguments[0],) * 3
        elif kind == "memory":
            arguments = (arguments[0], arguments[1], arguments[1])

    class Root(nn.Module):  # the model sees examples first, as models do
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, query: Tensor) -> Tensor:
            return self.attention(*arguments, need_weights=False)[0]

    root = Root()
    found = Recorder(root, approximation=approximation)
    again = root(query)
    torch.testing.assert_close(again if batch_first else again.transpose(0, 1), output)
    again.sin().mean().backward()
    assert nn.functional.linear is torch._C._nn.linear
    wanted = {f"attention/{name}": factors for name, factors in expected.factors().items()}
    assert_same(found.factors(), wanted)


def test_an_attention_that_fails_leaves_nothing_patched() -> None:
    module = nn.MultiheadAttention(6, 2)
    recorder = Recorder(module)
    with pytest.raises((RuntimeError, AssertionError)):
        module(torch.zeros(2, 3, 6), torch.zeros(2, 3, 5), torch.zeros(2, 3, 6))
    assert nn.functional.linear is torch._C._nn.linear and recorder.factors() == {}


class Net(nn.Module):
    """A convolution, an activation in place, and a layer that is used twice."""

    def __init__(self, *, checkpointed: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.twice, self.head = nn.Conv2d(2, 3, 3), nn.Linear(12, 12), nn.Linear(12, 4)
        self.checkpointed = checkpointed
        self.double()

    def body(self, x: Tensor) -> Tensor:
        hidden = self.twice(self.convolution(x).relu_().flatten(1)).relu_()
        return self.twice(hidden).tanh()

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            x = checkpoint(self.body, x, use_reentrant=self.checkpointed == "reentrant")
        else:
            x = self.body(x)
        return self.head(x)


def batch(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return x, torch.arange(count) % 4


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected) and found
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-13)


def factors_of(net: Net, *, splits: int = 1, reduction: str = "mean", approximation: str = "expand") -> Any:
    recorder = Recorder(net, batch_reduction=reduction, approximation=approximation)
    x, labels = batch(12)
    for part, label in zip(x.chunk(splits), labels.chunk(splits), strict=True):
        loss = nn.functional.cross_entropy(net(part), label, reduction=reduction)
        (loss / splits if reduction == "mean" else loss).backward()
    divisor = splits if reduction == "mean" else 1
    found = recorder.factors(divisor=divisor)
    recorder.close()
    return found


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_splits_and_reductions_change_nothing(approximation: str) -> None:
    expected = factors_of(Net(), approximation=approximation)
    assert_same(factors_of(Net(), splits=4, approximation=approximation), expected)
    assert_same(factors_of(Net(), reduction="sum", approximation=approximation), expected)
    assert_same(factors_of(Net(), reduction="sum", splits=3, approximation=approximation), expected)


@pytest.mark.parametrize("kind", ["reentrant", "saved tensors"])
def test_activation_checkpointing_counts_once(kind: str) -> None:
    assert_same(factors_of(Net(checkpointed=kind)), factors_of(Net()))


def test_a_layer_used_twice_is_the_sum_of_its_uses() -> None:
    net = Net()
    found = factors_of(net)["twice"]
    x, labels = batch(12)
    first = net.convolution(x).relu().flatten(1)
    one = net.twice(first)
    second = one.relu()
    two = net.twice(second)
    loss = nn.functional.cross_entropy(net.head(two.tanh()), labels, reduction="sum")
    gradients = torch.cat(torch.autograd.grad(loss, [one, two]))
    rows = torch.cat([torch.cat([part, torch.ones(12, 1).double()], 1) for part in (first, second)])
    torch.testing.assert_close(found, ((rows.T @ rows / 24,), gradients.T @ gradients / 12))


def test_an_activation_in_place_on_a_sequence() -> None:
    """What a linear layer returns of a sequence is a view; a change in place gives a view a new history."""
    torch.manual_seed(0)
    found = []
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    first, second = nn.Linear(5, 6).double(), nn.Linear(6, 2).double()
    for activation in (nn.ReLU(), nn.ReLU(inplace=True)):
        net = nn.Sequential(first, activation, second)
        recorder = Recorder(net)
        net(x).sin().mean().backward()
        found.append(recorder.factors())
        recorder.close()
    assert set(found[1]) == {"0", "2"}
    assert_same(found[1], found[0])


def test_passes_that_do_not_train_leave_nothing() -> None:
    net = Net()
    recorder = Recorder(net)
    x, labels = batch(12)
    with torch.no_grad():
        net(x)
    net(x)  # never differentiated
    recorder.recording = False
    nn.functional.cross_entropy(net(x), labels).backward()
    assert recorder.factors() == {} and recorder.examples == 0
    recorder.recording = True
    nn.functional.cross_entropy(net(x), labels).backward()
    assert recorder.examples == 12
    assert_same(recorder.factors(), factors_of(Net()))
    recorder.clear()
    assert recorder.factors() == {}


def test_under_autocast_sums_are_exact() -> None:
    """Inputs and gradients are bfloat16 there; their products are not rounded again."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    recorder = Recorder(net)
    x = torch.randn(500, 64)
    with torch.autocast("cpu", torch.bfloat16):
        net(x).square().mean().backward()
    (inputs,) = recorder.factors()["1"][0]
    hidden = nn.functional.linear(x.bfloat16(), net[0].weight.bfloat16(), net[0].bias.bfloat16()).double()
    expected = hidden.T @ hidden / 500
    assert inputs.dtype == torch.float32
    assert float((inputs[:64, :64].double() - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_what_has_no_rule_is_named_and_shared_weights_are_one_layer() -> None:
    net = nn.ModuleDict(
        {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.PReLU(), "d": nn.Linear(3, 4), "e": nn.Bilinear(2, 2, 2)}
    )
    net["b"].weight = net["a"].weight
    net["d"].requires_grad_(False)
    layers, reasons = find_layers(net)
    assert [(layer.name, len(layer.modules)) for layer in layers] == [("a", 2)]
    assert reasons == {
        "b": "shares its weight with a, but not its bias",
        "c": "no rule for PReLU",
        "e": "no rule for Bilinear",
    }


def test_a_layer_of_ones_own() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2.0 * x)

    class ScaledRule(linear.LinearRule):
        kinds = (Scaled,)

        def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
            return super().inputs(module, part, 2.0 * values, batch)

    net = nn.Sequential(Scaled(3, 2)).double()
    assert find_layers(net)[0] == []  # a subclass may compute something else
    register(ScaledRule())
    recorder = Recorder(net)
    x = torch.randn(7, 3, dtype=torch.float64)
    net(x).square().mean().backward()
    rows = torch.cat([2 * x, torch.ones(7, 1)], 1)
    torch.testing.assert_close(recorder.factors()["0"][0][0], rows.T @ rows / 7)
