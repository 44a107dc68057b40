"""K-FAC's step against golden values, dense matrices and single examples, and what must not change it."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_soo import KFAC
from lightning_soo.integrations.trainer import say_accumulation
from lightning_soo.optim import contributions
from lightning_soo.optim.takeover import take_over
from lightning_soo.transport import Transport

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "kfac_mlp.npz")
# one step that shows the direction: nothing before, after or around it
PLAIN: dict[str, Any] = {
    "lr": 1.0,
    "momentum": 0.0,
    "kl_clip": None,
    "factor_decay": 0.0,
    "statistics_frequency": 1,
    "precondition_frequency": 1,
    "refresh_delay": 0,
    "start_preconditioning_step": 1,
    "workers": "inline",
}


def golden_net() -> tuple[nn.Sequential, Tensor, Tensor]:
    net = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    net.load_state_dict({name: torch.from_numpy(GOLDEN[f"param/{name}"].copy()) for name in net.state_dict()})
    return net, torch.from_numpy(GOLDEN["X"].copy()), torch.from_numpy(GOLDEN["y"].copy())


def moved(model: nn.Module, take: Callable[[], Any]) -> dict[str, Tensor]:
    """By how much ``take`` moves every parameter."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("method", ["exact", "pi"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(("fisher", "known"), [("empirical", "emp"), ("ggn", "type2")])
def test_golden_directions(method: str, approximation: str, fisher: str, known: str) -> None:
    net, x, y = golden_net()
    damping: dict[str, Any] = {"damping": float(GOLDEN["lam"]), "damping_method": method}
    optimizer = KFAC(net, **PLAIN, **damping, approximation=approximation, fisher=fisher)
    nn.functional.cross_entropy(net(x), y).backward()
    steps = moved(net, optimizer.step)
    for layer in ("0", "2", "4"):
        found = torch.cat([steps[f"{layer}.weight"], steps[f"{layer}.bias"][:, None]], 1)
        expected = -GOLDEN[f"precond_{method}/{known}/{approximation}/{layer}"]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_a_deep_linear_network_has_its_dense_gauss_newton_blocks() -> None:
    """There gradients do not depend on the example, so that the Kronecker product is exact for any number of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)).double()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 2).double()
    optimizer = KFAC(net, **PLAIN, damping=0.05, fisher="ggn", likelihood="gaussian")
    (0.5 * (net(x) - y).square().sum() / len(x)).backward()
    gradients = {name: parameter.grad.detach().clone() for name, parameter in net.named_parameters()}

    def outputs(*values: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(net, dict(zip(names, values, strict=True)), (x,))
        return found

    names = list(gradients)
    jacobians = torch.autograd.functional.jacobian(outputs, tuple(p.detach() for p in net.parameters()))
    steps = moved(net, optimizer.step)
    for layer in ("0", "1", "2"):
        own = [index for index, name in enumerate(names) if name.startswith(layer)]
        jacobian = torch.cat([jacobians[index].flatten(2) for index in own], 2).flatten(0, 1)
        dense = jacobian.T @ jacobian / len(x) + 0.05 * torch.eye(jacobian.shape[1]).double()
        gradient = torch.cat([gradients[names[index]].flatten() for index in own])
        found = torch.cat([steps[names[index]].flatten() for index in own])
        torch.testing.assert_close(found, -torch.linalg.solve(dense, gradient), rtol=1e-9, atol=1e-12)


def transposed_linear() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 4)


# layers that see one position of one example, where the empirical Fisher matrix has the gradient alone
ONE_POSITION: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(4, 3), lambda: torch.randn(1, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), lambda: torch.randn(1, 4)),
    "transposed linear": (lambda: transposed_linear(), lambda: torch.randn(1, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 4), lambda: torch.randn(1, 2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 3)), lambda: torch.randn(1, 2, 2, 3)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), lambda: torch.randn(1, 4, 2, 2)),
    "conv2d channels_last": (
        lambda: nn.Conv2d(4, 6, 2).to(memory_format=torch.channels_last),
        lambda: torch.randn(1, 4, 2, 2),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), lambda: torch.randn(1, 2, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(5, 3), lambda: torch.tensor([[3]])),
    "layer norm": (lambda: nn.LayerNorm(4), lambda: torch.randn(1, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), lambda: torch.randn(1, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(1, 4, 3)),
    "attention": (lambda: Attention(), lambda: torch.randn(1, 1, 4)),
    "attention, separate": (lambda: Attention(kdim=3, vdim=2), lambda: torch.randn(1, 1, 4)),
}


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.attention
        result: Tensor = wide(x, x[..., : wide.kdim], x[..., : wide.vdim])[0]
        return result


def parts_of(module: nn.Module) -> list[list[tuple[str, tuple[slice, ...]]]]:
    """Which elements share a block of the Fisher matrix: written down anew, not taken from the library."""
    if isinstance(module, Attention):
        names = ["in_proj_weight"] * 3
        rows = [slice(4 * i, 4 * i + 4) for i in range(3)]
        weights = [(f"attention.{name}", (own,)) for name, own in zip(names, rows, strict=True)]
        if module.attention.in_proj_weight is None:
            weights = [(f"attention.{key}_proj_weight", (slice(None),)) for key in "qkv"]
        found = [[weight, ("attention.in_proj_bias", (own,))] for weight, own in zip(weights, rows, strict=True)]
        return [*found, [("attention.out_proj.weight", (slice(None),)), ("attention.out_proj.bias", (slice(None),))]]
    names = [name for name, _ in module.named_parameters()]
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        return [[(name, (slice(channel, channel + 1),)) for name in names] for channel in range(4)]
    groups = getattr(module, "groups", 1)
    size = next(module.parameters()).shape[0] // groups
    return (
        [[(name, (slice(g * size, (g + 1) * size),)) for name in names] for g in range(groups)]
        if (groups > 1)
        else [[(name, (slice(None),)) for name in names]]
    )


@pytest.mark.parametrize("method", ["exact", "pi"])
@pytest.mark.parametrize("name", ONE_POSITION)
def test_every_layer_inverts_the_dense_fisher_of_one_example(name: str, method: str) -> None:
    torch.manual_seed(0)
    make, inputs = ONE_POSITION[name]
    module, x = make().double(), inputs()
    x = x.double() if x.is_floating_point() else x
    damping = 0.3
    optimizer = KFAC(module, **PLAIN, damping=damping, damping_method=method)
    weight = torch.randn_like(module(x).detach())
    (module(x) * weight).sum().backward()
    gradients = {name: parameter.grad.detach().clone() for name, parameter in module.named_parameters()}
    steps = moved(module, optimizer.step)
    for part in parts_of(module):
        gradient = torch.cat([gradients[name][own].flatten() for name, own in part])
        found = torch.cat([steps[name][own].flatten() for name, own in part])
        if method == "exact":
            # (g g^T + lambda I)^-1 g by the dense matrix
            dense = torch.outer(gradient, gradient) + damping * torch.eye(len(gradient), dtype=gradient.dtype)
            torch.testing.assert_close(found, -torch.linalg.solve(dense, gradient), rtol=1e-9, atol=1e-12)
        else:  # along the gradient, shorter than without curvature and longer than with all damping added up
            assert gradient @ found <= 0
            if gradient.abs().max() > 0:
                assert 0 < -(gradient @ found) / (gradient @ gradient) <= 1 / damping * (1 + 1e-9)


def test_zero_inputs_stand_still() -> None:
    """A layer whose gradient is zero keeps its factors and does not move."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    optimizer = KFAC(net, **PLAIN)
    for dead in (False, True, False):
        optimizer.zero_grad()
        (net(torch.randn(5, 3).double()) * (0.0 if dead else 1.0)).sum().backward()
        counts = [block.observations for member in optimizer._members for block in member.blocks]
        steps = moved(net, optimizer.step)
        assert dead == all(not step.any() for step in steps.values())
        if dead:
            assert counts == [block.observations for member in optimizer._members for block in member.blocks]


class Net(nn.Module):
    """Convolutions, normalisation, a layer used twice, in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(x)))
        x = torch.relu_(self.again(torch.relu_(self.again(x))))
        result: Tensor = self.head(x.flatten(1))
        return result


def train(
    steps: int = 6,
    *,
    reduction: str = "mean",
    micro_batches: int = 1,
    uneven: bool = False,
    loss_scale: float = 1.0,
    divide: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """Parameters after a few steps; gradients are the same however the batch is split."""
    torch.manual_seed(0)
    net = Net().double()
    optimizer = KFAC(
        net,
        lr=0.1,
        damping=0.01,
        statistics_frequency=1,
        precondition_frequency=2,
        start_preconditioning_step=1,
        batch_reduction=reduction,
        workers="inline",
        **options,
    )
    if divide:
        scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, enabled=loss_scale != 1.0)
        optimizer.accumulate(micro_batches, scaler if loss_scale != 1.0 else None)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(12, 1, 6, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(0, 3, (12,), generator=generator)
        optimizer.zero_grad()
        for inputs, labels in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            loss = nn.functional.cross_entropy(net(inputs), labels, reduction=reduction)
            (loss * loss_scale / (micro_batches if reduction == "mean" else 1)).backward()
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad /= loss_scale * (12 if reduction == "sum" else 1)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize(
    "split",
    [
        {"micro_batches": 4},
        {"reduction": "sum"},
        {"reduction": "sum", "micro_batches": 3, "divide": False},
        {"loss_scale": 1024.0},
        {"loss_scale": 64.0, "micro_batches": 2},
    ],
)
def test_the_same_whatever_the_split(split: dict[str, Any], approximation: str) -> None:
    whole, found = train(approximation=approximation), train(approximation=approximation, **split)
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11)


def test_without_a_divisor_accumulation_would_change_it() -> None:
    """The test above can fail."""
    wrong = train(micro_batches=4, divide=False)
    assert any(not torch.allclose(wrong[name], expected, rtol=1e-6) for name, expected in train().items())


def test_the_bound_on_the_step() -> None:
    """``nu = sqrt(kl_clip / sum lr^2 <D, G>)`` over all layers."""
    net, x, y = golden_net()
    free, bound = copy.deepcopy(net), net
    gradients = {}
    results = {}
    for key, model, clip in (("free", free, None), ("bound", bound, 1e-4)):
        optimizer = KFAC(model, **{**PLAIN, "kl_clip": clip, "lr": 0.5}, damping=0.1)
        nn.functional.cross_entropy(model(x), y).backward()
        gradients = {name: parameter.grad.detach().clone() for name, parameter in model.named_parameters()}
        results[key] = moved(model, optimizer.step)
    product = sum(float((-step * 0.5 * gradients[name]).sum()) for name, step in results["free"].items())
    factor = (1e-4 / product) ** 0.5
    assert factor < 1
    for name, step in results["free"].items():
        torch.testing.assert_close(results["bound"][name], step * factor, rtol=1e-10, atol=0)


def test_uncovered_parameters_are_named_and_move_as_with_sgd() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.gain = nn.Parameter(torch.ones(2))
            self.recurrent = nn.LSTMCell(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.ones(len(x), 2, dtype=x.dtype)  # zeros would leave a weight without a gradient
            result: Tensor = self.recurrent(self.layer(x) * self.gain, (hidden, hidden))[0]
            return result

    torch.manual_seed(0)
    net = Mixed().double()
    plain = copy.deepcopy(net)
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    optimizer = KFAC(net, **{**PLAIN, **settings}, weight_decay=0.01, decoupled_weight_decay=False)
    sgd = torch.optim.SGD(
        [p for name, p in plain.named_parameters() if not name.startswith("layer")], **settings, weight_decay=0.01
    )
    x = torch.randn(4, 3, dtype=torch.float64)
    for _ in range(3):
        plain.layer.load_state_dict(net.layer.state_dict())
        for model, own in ((net, optimizer), (plain, sgd)):
            own.zero_grad()
            model(x).square().sum().backward()
            own.step()
        for name, expected in plain.named_parameters():
            if not name.startswith("layer"):
                torch.testing.assert_close(net.get_parameter(name), expected)
    table = optimizer.plan_table()
    assert "no rule for LSTMCell" in table
    row = next(line for line in table.splitlines() if line.startswith("gain"))
    assert "sgd" in row and "no rule for Mixed" in row


def test_a_bias_in_another_group_or_without_its_weight_is_preconditioned_by_itself() -> None:
    def directions(groups: Callable[[nn.Linear], Any]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2).double()
        optimizer = KFAC(groups(layer), **PLAIN, damping=0.1)
        optimizer.attach(layer)
        x, target = torch.randn(6, 3).double(), torch.randn(6, 2).double()
        nn.functional.mse_loss(layer(x), target).backward()
        error = layer(x).detach() - target
        gradients = error * 2 / 2  # of the loss of one example, a mean over two outputs
        own = {"A": x.T @ x / 6, "G": gradients.T @ gradients / 6}
        own |= {f"gradient/{name}": p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        return {**moved(layer, optimizer.step), **own}

    apart = directions(lambda layer: [{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}])
    eye = torch.eye(2).double()
    expected = -torch.linalg.solve(apart["G"] + 0.1 * eye, apart["gradient/bias"])
    torch.testing.assert_close(apart["bias"], expected)
    dense = torch.kron(apart["G"], apart["A"]) + 0.1 * torch.eye(6).double()
    expected = -torch.linalg.solve(dense, apart["gradient/weight"].flatten()).view(2, 3)
    torch.testing.assert_close(apart["weight"], expected)

    def only_bias(layer: nn.Linear) -> Any:
        layer.weight.requires_grad_(False)
        return layer

    frozen = directions(only_bias)
    torch.testing.assert_close(frozen["bias"], apart["bias"])
    assert not frozen["weight"].any()


def test_resnet_is_preconditioned_on_every_layer() -> None:
    """What the existing library gets wrong: there the direction of a convolution is the gradient's."""
    recipe = Path(__file__).parents[2] / "recipes" / "image_classification" / "model.py"
    spec = importlib.util.spec_from_file_location("image_classification_model", recipe)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    net = module.ResNet20(1, 10, width=4)
    optimizer = KFAC(net, **PLAIN)
    x, y = torch.randn(16, 1, 28, 28), torch.randint(0, 10, (16,))
    nn.functional.cross_entropy(net(x), y).backward()
    gradients = {name: parameter.grad.detach().clone() for name, parameter in net.named_parameters()}
    steps = moved(net, optimizer.step)
    for name, gradient in gradients.items():
        if gradient.ndim > 1:
            cosine = torch.nn.functional.cosine_similarity(-steps[name].flatten(), gradient.flatten(), dim=0)
            assert 0.0 < cosine < 0.98, name


def factors_of(optimizer: KFAC) -> list[Tensor]:
    blocks = optimizer.state_dict()["second_order"]["blocks"]
    return [matrix for entry in blocks.values() for matrix in entry["statistics"]["matrices"]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_change_nothing(bad: float) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizer = KFAC(net, lr=0.1, statistics_frequency=1, precondition_frequency=2, workers="inline")
    x = torch.randn(4, 1, 6, 6)
    for step in range(6):
        optimizer.zero_grad()
        inputs = x.clone()
        if step == 3:
            inputs[0, 0, 0, 0] = bad
        net(inputs).square().mean().backward()
        before = copy.deepcopy(factors_of(optimizer))
        if step == 3:
            with pytest.warns(UserWarning, match="not finite"):
                steps = moved(net, optimizer.step)
            assert not any(step.any() for step in steps.values())
            assert all(map(torch.equal, before, factors_of(optimizer)))
        else:
            optimizer.step()
    assert optimizer.skipped_steps == 1 and all(torch.isfinite(p).all() for p in net.parameters())


def test_captures_belong_to_a_step() -> None:
    """What is thrown away with zero_grad(), seen in evaluation or without gradients leaves no trace."""

    def run(disturb: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = Net().double()
        optimizer = KFAC(net, lr=0.1, statistics_frequency=1, precondition_frequency=1, workers="inline")
        x = torch.randn(5, 4, 1, 6, 6, dtype=torch.float64)
        for batch in x:
            if disturb:
                net(batch * 3).square().sum().backward()
                optimizer.zero_grad()
                net.eval()
                with torch.no_grad():
                    net(batch * 5)
                net.train()
            else:
                optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
        return dict(net.named_parameters())

    calm, disturbed = run(False), run(True)
    for name, expected in calm.items():
        assert torch.equal(disturbed[name], expected), name


def test_a_layer_that_is_not_seen_is_named(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = KFAC(net, **PLAIN)
    x = torch.randn(4, 3)
    # the weight of the second layer, but not the layer
    nn.functional.linear(net[0](x), net[1].weight, net[1].bias).square().mean().backward()
    with caplog.at_level("WARNING"):
        steps = moved(net, optimizer.step)
    assert "layer '1' has a gradient, but no pass through it was seen" in caplog.text
    assert all(step.any() for step in steps.values())  # SGD moves it


@pytest.mark.parametrize("what", ["gradients", "inputs"])
def test_factors_that_overflow_stand_still_and_are_named(what: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = KFAC(net, **{**PLAIN, "lr": 1e-3})
    net(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    before = [factor.clone() for factor in factors_of(optimizer)]
    optimizer.zero_grad()
    if what == "gradients":
        (net[1](net[0](torch.randn(4, 3)).detach()).sum() * 1e25).backward()  # finite, but its square is not
    else:
        (1e-25 * net(1e25 * torch.randn(4, 3))).sum().backward()  # a finite gradient of inputs whose squares are not
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())
    with caplog.at_level("WARNING"):
        optimizer.step()
    assert "layer '1' has a gradient, but its factors are not finite" in caplog.text
    assert all(map(torch.equal, before, factors_of(optimizer))) and optimizer.steps == 2


def test_hooks_of_a_dropped_optimizer_go_with_it() -> None:
    net = nn.Linear(3, 2)
    optimizer = KFAC(net, **PLAIN)
    recorder = optimizer._recorder
    assert recorder is not None
    del optimizer
    gc.collect()
    net(torch.randn(4, 3)).sum().backward()
    assert recorder.examples == 0 and not net._forward_hooks


def test_without_a_model_the_error_says_what_to_do() -> None:
    net = nn.Linear(3, 2)
    optimizer = KFAC(net.parameters(), lr=0.1)
    net(torch.randn(4, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"KFAC\(model, ...\)"):
        optimizer.step()


def test_the_first_inverses_are_those_of_step_five() -> None:
    """Before them K-FAC is SGD, momentum included."""
    torch.manual_seed(0)
    net, other = nn.Linear(6, 4), nn.Linear(6, 4)
    other.load_state_dict(net.state_dict())
    optimizer, sgd = KFAC(net, lr=0.1, workers="inline"), torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for step in range(1, 6):
        inputs = torch.randn(16, 6)
        for model, one in ((net, optimizer), (other, sgd)):
            one.zero_grad()
            nn.functional.cross_entropy(model(inputs), torch.arange(16) % 4).backward()
            one.step()
        assert torch.allclose(net.weight, other.weight, rtol=1e-6, atol=1e-6) == (step < 5)


def test_copies_and_pickles_go_on_alike() -> None:
    torch.manual_seed(0)
    net = Net().double()
    optimizer = KFAC(net, lr=0.1, statistics_frequency=1, precondition_frequency=2, workers="inline")
    x = torch.randn(8, 4, 1, 6, 6, dtype=torch.float64)

    def run(model: nn.Module, own: KFAC, batches: Tensor) -> None:
        for batch in batches:
            own.zero_grad()
            model(batch).square().mean().backward()
            own.step()

    run(net, optimizer, x[:4])
    twin, saved = Net().double(), io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    twin.load_state_dict(net.state_dict())
    loaded = KFAC(twin, lr=0.1, statistics_frequency=1, precondition_frequency=2, workers="inline")
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    both: list[tuple[nn.Module, KFAC]] = [(twin, loaded)]
    for copied in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        model, own = copied
        own.remember(model)
        both.append((model, own))
    run(net, optimizer, x[4:])
    for model, own in both:
        run(model, own, x[4:])
        for name, expected in net.named_parameters():
            assert torch.equal(model.get_parameter(name), expected), name


def test_adaptive_damping_follows_the_quadratic_model() -> None:
    """For a linear model with squared loss and its exact curvature the prediction is the reduction: damping falls.

    One example, so that the empirical Fisher matrix is the gradient's outer product; a loss that rises raises it.
    """
    torch.manual_seed(0)
    layer = nn.Linear(3, 1, bias=False).double()
    options = {**PLAIN, "lr": 1.0, "damping": 1e-3, "adaptive_damping": {"interval": 1, "factor": 0.5}}
    optimizer = KFAC(layer, **options)
    x = torch.randn(1, 3).double()
    start = layer.weight.detach().clone()
    # with residual 1 the Gauss-Newton matrix x x^T equals the gradient's outer product
    target = layer(x).detach() - 1.0

    def loss() -> Tensor:
        return 0.5 * (layer(x) - target).square().sum()

    optimizer.evaluate = loss
    loss().backward()
    before = float(loss().detach())
    optimizer.step()
    actual = float(loss().detach()) - before
    step = (layer.weight.detach() - start).flatten()
    curvature = torch.outer(x[0], x[0]) + 1e-3 * torch.eye(3).double()
    predicted = float(x[0] @ step + 0.5 * step @ curvature @ step)
    assert optimizer._predicted == pytest.approx(predicted, rel=1e-9)
    assert actual == pytest.approx(predicted, rel=1e-2)
    assert optimizer.damping == 5e-4

    optimizer.zero_grad()
    layer.weight.data.copy_(start)
    loss().backward()
    optimizer.evaluate = lambda: -loss()
    optimizer.step()
    assert optimizer.damping == 1e-3

    optimizer.zero_grad()
    layer.weight.data.copy_(start)
    loss().backward()
    optimizer.evaluate = lambda: loss() if torch.equal(layer.weight, start) else loss() * float("nan")
    optimizer.step()
    assert optimizer.damping == 2e-3 and torch.equal(layer.weight, start) and optimizer.skipped_steps == 1


def test_adaptive_damping_without_a_loss_says_what_to_do() -> None:
    layer = nn.Linear(3, 1)
    optimizer = KFAC(layer, **PLAIN, adaptive_damping={"interval": 1})
    layer(torch.randn(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"optimizer.evaluate"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"did you mean 'interval'"):
        KFAC(layer, adaptive_damping={"intervals": 1})
    with pytest.raises(ValueError, match="no effect with grafting='adam'"):
        KFAC(layer, adaptive_damping=True, grafting="adam")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_takes_over(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    net = Net().double()
    optimizer = kind(net.parameters(), lr=0.01)
    taken = take_over(optimizer, "kfac", {"statistics_frequency": 1, "precondition_frequency": 2}, net)
    assert isinstance(taken, KFAC) and taken is optimizer
    assert taken.options.grafting == ("adam" if kind is torch.optim.AdamW else None)
    x, y = torch.randn(8, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    losses = []
    for _ in range(20):
        taken.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        taken.step()
    assert losses[-1] < 0.5 * losses[0] and taken.diagnostics()["condition_number"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping_method": "exakt"}, "did you mean 'exact'"),
        ({"kl_clip": -1.0}, "kl_clip=-1.0"),
        ({"factor_decay": 1.0}, "factor_decay=1.0"),
        ({"fisher": "monte-carlo"}, "fisher='monte-carlo'"),
        ({"approximation": "sum"}, "approximation='sum'"),
        ({"gram_dtype": "int8"}, "gram_dtype='int8'; choose one of 'float32'"),
        ({"gram_dtype": "float16"}, "gram_dtype=torch.float16: sums of squares overflow"),
        ({"overrides": [{"match": "x", "max_preconditioner_dim": 8}]}, "'max_preconditioner_dim' does not apply"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(nn.Linear(2, 2), **options)


@pytest.mark.parametrize("damping_method", ["exact", "pi"])
@pytest.mark.parametrize("workers", ["thread", "process"])
def test_inverses_from_workers_have_the_same_bits(workers: str, damping_method: str) -> None:
    """At a fixed staleness, whoever computes them."""

    def run(kind: str) -> list[Tensor]:
        torch.manual_seed(0)
        net = Net()
        optimizer = KFAC(
            net,
            lr=0.05,
            damping=1e-2,
            damping_method=damping_method,
            statistics_frequency=1,
            precondition_frequency=4,
            start_preconditioning_step=2,
            refresh_delay=3,
            workers=kind,
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(14):
            x = torch.randn(6, 1, 6, 6, generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), torch.arange(6) % 3).backward()
            optimizer.step()
        staleness = optimizer.diagnostics()["staleness"]
        optimizer.close()
        return [torch.tensor(staleness), *(parameter.detach() for parameter in net.parameters())]

    for found, expected in zip(run(workers), run("inline"), strict=True):
        assert torch.equal(found, expected)


def test_a_gradient_scaler_changes_nothing_and_an_overflow_leaves_no_trace() -> None:
    def run(scaled: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(0)
        net = Net().double()
        optimizer = KFAC(net, lr=0.05, damping=1e-2, statistics_frequency=1, precondition_frequency=2, workers="inline")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        optimizer.accumulate(1, scaler)
        x = torch.randn(9, 4, 1, 6, 6, dtype=torch.float64)
        for step, batch in enumerate(x):
            if step == 4 and not scaled:
                continue
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch), torch.arange(4) % 3)
            scaler.scale(loss * (float("inf") if step == 4 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert not scaled or scaler.get_scale() == 2.0**11
        return [parameter.detach() for parameter in net.parameters()], factors_of(optimizer)

    for found, expected in zip(run(True), run(False), strict=True):
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["exact", "pi"])
def test_factors_of_limited_order_against_the_dense_matrix(method: str) -> None:
    """Inputs as channels times space, outputs as a diagonal; a bias then stands by itself."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5, bias=False)).double()
    x, y = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    damping = 0.05
    optimizer = KFAC(
        net, **PLAIN, damping=damping, damping_method=method, max_preconditioner_dim=4, input_shapes={"0": (3, 2)}
    )
    output = net(x)
    (0.5 * (output - y).square().sum() / len(x)).backward()
    error = (output - y).detach()  # gradients of single examples at the output, and below it
    below = error @ net[1].weight.detach()
    inputs = net[0](x).detach()
    gradients = {name: parameter.grad.detach().clone() for name, parameter in net.named_parameters()}
    steps = moved(net, optimizer.step)

    def inverse(factors: list[Tensor], gradient: Tensor) -> Tensor:
        if method == "exact":
            dense = functools.reduce(torch.kron, factors) + damping * torch.eye(gradient.numel()).double()
            return torch.linalg.solve(dense, gradient.flatten()).view_as(gradient)
        means = [float(factor.diagonal().mean()) for factor in factors]
        geometric = float(np.prod(means)) ** (1 / len(means))
        shares = [damping ** (1 / len(means)) * mean / geometric for mean in means]
        eyes = [torch.eye(len(factor)).double() * share for factor, share in zip(factors, shares, strict=True)]
        dense = functools.reduce(torch.kron, [a + b for a, b in zip(factors, eyes, strict=True)])
        return torch.linalg.solve(dense, gradient.flatten()).view_as(gradient)

    pairs = x.view(7, 3, 2)
    channels = torch.einsum("ncs,nds->cd", pairs, pairs) / 7
    space = torch.einsum("ncs,nct->st", pairs, pairs) / 7
    first = [below.T @ below / 7, channels, space / space.trace()]
    torch.testing.assert_close(steps["0.weight"], -inverse(first, gradients["0.weight"]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(steps["0.bias"], -inverse(first[:1], gradients["0.bias"]), rtol=1e-9, atol=1e-12)
    second = [torch.diag((error**2).mean(0)), inputs.T @ inputs / 7]
    torch.testing.assert_close(steps["1.weight"], -inverse(second, gradients["1.weight"]), rtol=1e-9, atol=1e-12)


def test_factors_go_to_where_the_parameters_are_kept() -> None:
    """An engine that offloads keeps them elsewhere than where layers are seen; here that is no memory at all."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = KFAC(net, **PLAIN)
    optimizer.attach()
    net(torch.randn(4, 3)).square().mean().backward()
    (block,) = [block for member in optimizer._members for block in member.blocks]
    recorder = optimizer._watched()
    block.device = torch.device("meta")
    (own,) = (
        contributions.Contributions(Transport(), {"0": block}, {"0": 0}, recorder, gradient_scale=1.0).finish().values()
    )
    packed = contributions._packed(block, recorder.sums[block.layer.layer], 4, torch.float32)
    assert {array.device.type for array in (*own, *packed)} == {"meta"}


def test_gradients_that_others_drop_take_their_statistics_along() -> None:
    """A scaler leaves a step out after an overflow, and the Transformers Trainer then clears the model's gradients."""
    found = []
    for overflows in (0, 2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        optimizer = KFAC(net, **PLAIN)
        for _ in range(overflows):
            optimizer.accumulate(1, SimpleNamespace(get_scale=lambda: 64.0))
            (64.0 * net(torch.randn(4, 3)).square().mean()).backward()
            net.zero_grad()
        optimizer.accumulate(2, None)
        for part in torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).split(4):
            (net(part).square().mean() / 2).backward()
        optimizer.step()
        found.append(factors_of(optimizer))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_manual_optimization_says_itself_by_what_losses_are_divided() -> None:
    optimizer = KFAC(nn.Linear(3, 2))
    optimizer.accumulate(4)
    precision = SimpleNamespace(scaler=None)
    for automatic, wanted in ((False, 4), (True, 2)):
        module = SimpleNamespace(automatic_optimization=automatic)
        trainer = SimpleNamespace(precision_plugin=precision, lightning_module=module, accumulate_grad_batches=2)
        say_accumulation([optimizer], trainer)
        assert optimizer.micro_batches == wanted
