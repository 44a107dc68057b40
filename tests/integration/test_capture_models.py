"""Real architectures are captured: what trains has factors or is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_soo.capture.recorder import Recorder


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    tokens = torch.randint(0, 50, (3, 7))
    return BertForSequenceClassification(config), {"input_ids": tokens, "labels": torch.tensor([0, 1, 0])}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    tokens = torch.randint(0, 50, (3, 7))
    return GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return ViTForImageClassification(config), {
        "pixel_values": torch.randn(3, 3, 8, 8),
        "labels": torch.tensor([0, 1, 0]),
    }


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Any:
        return {"loss": self.encoder(x).sin().mean()}


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    return Encoder(True), {"x": torch.randn(3, 5, 16)}


def encoder_sequence_first() -> tuple[nn.Module, dict[str, Tensor]]:
    return Encoder(False), {"x": torch.randn(5, 3, 16)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [bert, gpt2, vit, encoder, encoder_sequence_first])
def test_everything_that_trains_has_factors_or_is_named(make: Any, checkpointing: bool) -> None:
    if make in (bert, gpt2, vit):
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = make()
    if checkpointing:
        if not hasattr(model, "gradient_checkpointing_enable"):
            pytest.skip("not for plain modules")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    recorder = Recorder(model)
    model(**inputs)["loss"].backward()
    found = recorder.factors()
    assert set(found) == {layer.name for layer in recorder.layers}
    covered = {
        id(module.get_parameter(name))
        for layer in recorder.layers
        for module in layer.modules
        for name in (layer.part.weight, layer.part.bias)
        if name is not None
    }
    named = [id(p) for name in recorder.reasons for p in model.get_submodule(name).parameters(recurse=False)]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert id(parameter) in covered or id(parameter) in named, name
    for name, (inputs_factor, gradients) in found.items():
        assert gradients.isfinite().all() and float(gradients.diagonal(dim1=-2, dim2=-1).amin()) >= 0, name
        assert all(factor.isfinite().all() for factor in inputs_factor), name
