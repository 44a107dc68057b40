"""Fisher information of a model's own outputs: golden values, dense Jacobians, and what must not change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_soo.capture.recorder import Recorder

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "kfac_mlp.npz")


def golden_net() -> tuple[nn.Sequential, Tensor]:
    net = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    net.load_state_dict({name: torch.from_numpy(GOLDEN[f"param/{name}"].copy()) for name in net.state_dict()})
    return net, torch.from_numpy(GOLDEN["X"].copy())


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_golden_gauss_newton(approximation: str) -> None:
    net, x = golden_net()
    recorder = Recorder(net, approximation=approximation, fisher="ggn")
    for part in x.tensor_split(3):  # parts of unlike sizes, and a scaled loss
        (net(part).square().mean() * 1000).backward()
    assert recorder.examples == len(x)
    for name, ((inputs,), gradients) in recorder.factors(divisor=3.0).items():
        prefix = f"curvlinops/type2/{approximation}/{name}/"
        np.testing.assert_allclose(inputs.numpy(), GOLDEN[prefix + "A_joint"], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(gradients.numpy(), GOLDEN[prefix + "G"], rtol=1e-8, atol=1e-12)
    assert set(recorder.factors()) == {"0", "2", "4"}


def test_drawn_labels_give_it_in_the_mean() -> None:
    net, x = golden_net()
    recorder = Recorder(net, fisher="mc", seed=1)
    for step in range(300):
        recorder.phase = step
        net(x).sum().backward()
    found = recorder.factors()
    for name, (_, gradients) in found.items():
        golden = GOLDEN[f"curvlinops/type2/expand/{name}/G"]
        assert np.linalg.norm(gradients.numpy() - golden) < 0.05 * np.linalg.norm(golden)
        few = GOLDEN[f"curvlinops/mc/expand/{name}/G"]  # of 64 draws
        assert np.linalg.norm(gradients.numpy() - few) < 0.2 * np.linalg.norm(golden)


def test_draws_are_those_of_the_seed_and_the_phase() -> None:
    net, x = golden_net()
    found = []
    for seed, phase in ((1, 2), (1, 2), (1, 3), (2, 2)):
        recorder = Recorder(net, fisher="mc", seed=seed)
        recorder.phase = phase
        for _ in range(2):
            net(x).sum().backward()
        found.append(recorder.factors()["4"][1])
        recorder.close()
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2]) and not torch.allclose(found[0], found[3])


class Net(nn.Module):
    """An activation in place, and a layer that is used twice."""

    def __init__(self, checkpointed: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.norm, self.head = (
            nn.Linear(3, 4),
            nn.Linear(4, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 3),
        )
        self.activation = nn.ReLU(inplace=True)
        self.checkpointed = checkpointed
        self.double()

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.twice(self.activation(self.twice(self.activation(self.first(x))))))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.checkpointed:
            x = checkpoint(self.body, x, use_reentrant=self.checkpointed == "reentrant")
        else:
            x = self.body(x)
        return {"features": x.detach(), "logits": self.head(x)}


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_gauss_newton_is_that_of_the_dense_jacobian(likelihood: str) -> None:
    """Of the last two layers' biases, whose gradients are those of the layers' outputs."""
    net, x = Net(), inputs(6)
    recorder = Recorder(net, fisher="ggn", likelihood=likelihood)
    net(x)["logits"].sum().backward()
    found = recorder.factors()
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for example in x.detach():

        def outputs(bias: Tensor, example: Tensor = example) -> Tensor:
            parameters = dict(net.named_parameters()) | {"first.bias": bias}
            return torch.func.functional_call(net, parameters, (example[None],))["logits"][0]

        recorder.recording = False
        jacobian = torch.autograd.functional.jacobian(outputs, net.first.bias.detach())
        p = outputs(net.first.bias).detach().softmax(0)
        hessian = torch.diag(p) - torch.outer(p, p) if likelihood == "categorical" else torch.eye(3).double()
        expected += jacobian.T @ hessian @ jacobian / 6
    torch.testing.assert_close(found["first"][1], expected)
    assert set(found) == {"first", "twice", "norm", "head"}


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_the_users_backward_pass_is_as_without(fisher: str) -> None:
    net, x = Net(), inputs(6, 2)
    expected = torch.autograd.grad(net(x)["logits"].sin().mean(), list(net.parameters()))
    recorder = Recorder(net, fisher=fisher)
    output = net(x)["logits"]
    assert all(parameter.grad is None for parameter in net.parameters())
    recorder.clear()  # gradients may be zeroed between the two passes: what has not come back yet stays
    output.sin().mean().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert recorder.examples == 6
    before = {name: factors[1].clone() for name, factors in recorder.factors().items()}
    assert set(before) == {"first", "twice", "norm", "head"}
    net(x)  # nobody differentiates it
    for name, gradients in before.items():
        assert torch.equal(recorder.factors()[name][1], gradients)
    net(x)["logits"].sum().backward()
    assert recorder.examples == 12
    recorder.clear()
    with torch.no_grad():
        net(x)
    assert recorder.factors() == {} and recorder.examples == 0


def test_the_loss_of_an_example_is_a_mean_over_its_positions() -> None:
    net, x = Net(), inputs(5, 7)
    recorder = Recorder(net, fisher="ggn")
    output = net(x)["logits"]
    output.sum().backward()
    p = output.detach().softmax(-1).flatten(0, 1)
    hessian = torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p)
    torch.testing.assert_close(recorder.factors()["head"][1], hessian.sum(0) / 7 / 5)


def test_checkpointing_is_seen_through_or_refused() -> None:
    x = inputs(6)
    found = []
    for kind in ("", "saved tensors"):
        net = Net(kind)
        recorder = Recorder(net, fisher="ggn")
        net(x)["logits"].sum().backward()
        found.append(recorder.factors())
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name])
    net = Net("reentrant")
    Recorder(net, fisher="ggn")
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        net(x)["logits"].sum().backward()


def test_under_autocast_outputs_are_narrow_and_sums_are_not() -> None:
    found = []
    for enabled in (False, True):
        net = Net().float()
        recorder = Recorder(net, fisher="ggn")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = net(inputs(6).float())["logits"]
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        output.sum().backward()
        found.append(recorder.factors())
    for name, (_, gradients) in found[1].items():
        assert gradients.dtype == torch.float32
        torch.testing.assert_close(gradients, found[0][name][1], rtol=0.1, atol=0.02)


def test_modules_that_are_called_by_themselves_are_observed_by_hand() -> None:
    net, x = golden_net()
    whole = Recorder(net, fisher="ggn")
    net(x).sum().backward()
    expected = whole.factors()
    assert set(expected) == {"0", "2", "4"}
    whole.close()
    recorder = Recorder(net, fisher="ggn")
    for _ in range(2):
        recorder.clear()
        output: Any = x
        for module in net:
            output = module(output)
        assert recorder.factors() == {}
        with pytest.warns(UserWarning, match="observe_outputs"):
            recorder.clear()  # a step without
        output = net[2:](net[1](net[0](x)))
        recorder.observe_outputs(output)
        output.sum().backward()
        assert recorder.examples == len(x)
        for name, factors in expected.items():
            torch.testing.assert_close(recorder.factors()[name], factors)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'empirical'"):
        Recorder(Net(), fisher="empiric")
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        Recorder(Net(), likelihood="gauss")
