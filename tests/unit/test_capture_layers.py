"""Layers are found under the names of their parameters, wrapped or not, with what trains in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_soo.capture.recorder import Recorder, find_layers


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
        self.body = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.body[2].weight
        self.head = nn.Linear(4, 7)
        self.head.weight = self.tokens.weight


EXPECTED = {
    "tokens": ("tokens.weight", None),
    "attention/q": ("attention.q_proj_weight", "attention.in_proj_bias"),
    "attention/k": ("attention.k_proj_weight", "attention.in_proj_bias"),
    "attention/v": ("attention.v_proj_weight", "attention.in_proj_bias"),
    "attention/out": ("attention.out_proj.weight", "attention.out_proj.bias"),
    "body.0/group0": ("body.0.weight", "body.0.bias"),
    "body.0/group1": ("body.0.weight", "body.0.bias"),
    "body.1": ("body.1.weight", "body.1.bias"),
    "body.2": ("body.2.weight", None),
}


def wrapped(how: str) -> nn.Module:
    model = Tied()
    if how == "checkpoint":
        model.body = checkpoint_wrapper(model.body)  # type: ignore[assignment]
        model.tokens = checkpoint_wrapper(model.tokens)  # type: ignore[assignment]
    if how == "inner compile":
        model.body = torch.compile(model.body)  # type: ignore[assignment]
    return torch.compile(model) if how == "compile" else model  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["plain", "checkpoint", "compile", "inner compile"])
def test_names_are_those_of_the_unwrapped_model(how: str) -> None:
    layers, reasons = find_layers(wrapped(how))
    assert {layer.name: (layer.weight, layer.bias) for layer in layers} == EXPECTED
    assert reasons == {"head": "shares its weight with tokens, a layer of another kind"}
    names = dict(Tied().named_parameters())
    assert all(layer.weight in names and (layer.bias is None or layer.bias in names) for layer in layers)
    assert all(layer.weight_trains and layer.bias_trains == (layer.bias is not None) for layer in layers)


def test_what_does_not_train_is_not_in_the_factors() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.LayerNorm(2))
    net[0].weight.requires_grad_(False)  # only its bias is tuned
    net[1].bias.requires_grad_(False)
    net[2].requires_grad_(False)
    recorder = Recorder(net)
    found = {layer.name: (layer.weight_trains, layer.bias_trains, layer.part.columns) for layer in recorder.layers}
    assert found == {"0": (False, True, 4), "1": (True, False, 4), "3": (True, True, 1)}
    assert [layer.bias for layer in recorder.layers] == ["0.bias", None, "3.bias"]
    net(torch.randn(5, 3)).square().mean().backward()
    assert {name: gradients.shape for name, (_, gradients) in recorder.factors().items()} == {
        "0": (4, 4),
        "1": (4, 4),
        "3": (2, 2, 2),
    }


def test_a_weight_that_is_computed_is_named() -> None:
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    layers, reasons = find_layers(net)
    assert layers == []
    assert reasons["0"] == "its weight is computed from other parameters"
    assert reasons["1"].startswith("no rule for Parametrized")
