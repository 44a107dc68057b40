"""The models that are measured, with the flops of one training step."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Attributes:
    model: makes the same model every time.
    batch: makes the inputs of step number ``n``.
    loss: of a model on such inputs.
    flops: of one forward and backward pass (2 flops a multiply-add, 3 products for each weight).
    """

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    flops: float


def digits() -> Tensor:
    return recipe("data").mnist_5k()


def autoencoder(batch_size: int, images: Tensor, seed: int = 0) -> Task:
    """784-1000-500-250-30-250-500-1000-784 on MNIST digits, the loss summed over pixels.

    Args:
        seed: of the initialisation and the order of the digits.
    """
    module = recipe("model")

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return module.Autoencoder(lr=0.0, steps=1).net

    per_epoch = len(images) // batch_size

    def batch(step: int) -> Tensor:
        epoch, index = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1_000_003 * seed + 1 + epoch))
        return images[order[index * batch_size : (index + 1) * batch_size]]

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(net(x), x, reduction="sum") / len(x)

    weights = sum(a * b for a, b in zip(module.WIDTHS, module.WIDTHS[1:], strict=False))
    return Task(
        name=f"autoencoder, batch {batch_size}", model=model, batch=batch, loss=loss, flops=6.0 * batch_size * weights
    )


class SmallGPT(nn.Module):
    def __init__(self, vocabulary: int = 4096, width: int = 384, layers: int = 6, context: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.token(tokens) + self.position
        return self.head(self.layers(hidden, mask=self.mask, is_causal=True))


def resnet20(batch_size: int = 64) -> Task:
    """He et al.'s ResNet-20 for 3 x 32 x 32 pictures, random ones, since only time is measured."""
    module = recipe("model", "image_classification")

    def model() -> nn.Module:
        torch.manual_seed(0)
        return module.ResNet20(3, 10).to(memory_format=torch.channels_last)

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + step % 8)
        return torch.randn(batch_size, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        labels = torch.arange(len(x), device=x.device) % 10
        return nn.functional.cross_entropy(net(x), labels)

    return Task(
        name=f"ResNet-20, batch {batch_size}", model=model, batch=batch, loss=loss, flops=6.0 * batch_size * 40.6e6
    )


def small_gpt(batch_size: int = 8, context: int = 128, vocabulary: int = 4096) -> Task:
    """6 layers, d 384, vocabulary 4096; random tokens, since only time is measured."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return SmallGPT(vocabulary, context=context)

    def batch(step: int) -> Tensor:
        return torch.randint(
            0, vocabulary, (batch_size, context + 1), generator=torch.Generator().manual_seed(1 + step % 8)
        )

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    tokens, width = batch_size * context, 384
    dense = 6 * 12 * width * width + vocabulary * width
    attention = 6 * 2 * context * width  # scores and values
    return Task(
        name=f"GPT 6 x 384, vocabulary {vocabulary}, {batch_size} x {context} tokens",
        model=model,
        batch=batch,
        loss=loss,
        flops=6.0 * tokens * (dense + attention),
    )


def text_gpt(seed: int = 0, batch_size: int = 16, context: int = 128) -> Task:
    """4 layers, d 256, on the bytes of the standard library's documentation.

    Args:
        seed: of the initialisation and the windows.
    """
    width, layers, vocabulary = 256, 4, 256
    module = recipe("small_gpt", "common")

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return module.SmallGPT(width, layers, length=context, vocabulary=vocabulary)

    def batch(step: int) -> Tensor:
        return text_windows(batch_size, torch.Generator().manual_seed(1_000_003 * seed + step), context)

    weights = layers * 12 * width * width + vocabulary * width
    attention = layers * 2 * context * width  # scores and values
    return Task(
        name=f"GPT {layers} x {width}, bytes of documentation, {batch_size} x {context}",
        model=model,
        batch=batch,
        loss=lambda net, x: net.loss(x),
        flops=6.0 * batch_size * context * (weights + attention),
    )


@cache
def text_bytes() -> Tensor:
    """The language reference that every Python installation has."""
    return torch.tensor(list(recipe("texts", "common").language_reference().encode()))


def text_windows(count: int, generator: torch.Generator, context: int = 128) -> Tensor:
    """``(count, context + 1)`` bytes of the documentation from places that the generator draws."""
    text = text_bytes()
    starts = torch.randint(0, len(text) - context, (count, 1), generator=generator)
    return text[starts + torch.arange(context + 1)]


@cache
def recipe(name: str, folder: str = "autoencoder") -> Any:
    """A file of a recipe as a module."""
    path = RECIPES / folder / f"{name}.py"
    if str(RECIPES / "common") not in sys.path:
        sys.path.append(str(RECIPES / "common"))  # what several recipes share
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
