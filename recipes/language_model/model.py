"""A Transformer over tokens, with causal attention (GPT) or without (BERT)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Layer(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        dropout = self.dropout if self.training else 0.0
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*split, dropout_p=dropout, is_causal=self.causal)
        attended = self.out(attended.transpose(1, 2).reshape(batch, length, width))
        x = x + functional.dropout(attended, dropout)
        return x + functional.dropout(self.narrow(functional.gelu(self.wide(self.norm2(x)))), dropout)


def sinusoids(length: int, width: int) -> Tensor:
    """Where the positions' vectors start: from random ones a small model takes long to find a token's neighbours.

    Sines and cosines whose wavelengths reach from 2 pi to 4 pi times ``length`` (Vaswani et al. 2017: to 20,000 pi).
    """
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(2 * length) / width))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


class LanguageModel(nn.Module):
    """Logits of tokens; the embedding is the last layer too.

    Args:
        vocabulary: number of tokens, [MASK] among them where there is one.
        length: of the longest row.
        causal: whether a position sees only itself and those before it.

    Raises:
        ValueError: ``heads`` does not divide ``width``, or ``width`` is odd.
    """

    _no_split_modules = ("Layer",)  # FSDP's units

    def __init__(
        self,
        vocabulary: int,
        *,
        length: int,
        width: int,
        layers: int,
        heads: int,
        causal: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"heads={heads} and 2 must divide width={width}")
        self.dropout = dropout
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(width, heads, causal=causal, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        scale = 0.02 * (1024 / width) ** 0.5  # BERT-Large's, and in proportion for other widths
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                residual = name.endswith(("out.weight", "narrow.weight"))  # as in GPT-2
                nn.init.normal_(parameter, std=scale / (2 * layers) ** 0.5 if residual else scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        waves = sinusoids(length, width)
        with torch.no_grad():
            self.position.weight.copy_(waves * (scale / waves.std()))

    def forward(self, codes: Tensor, positions: Tensor | None = None) -> Tensor:
        """
        Args:
            codes: batch x length.
            positions: batch x chosen, where logits are wanted; None is everywhere.

        Returns:
            batch x chosen x vocabulary.
        """
        x = self.token(codes) + self.position(torch.arange(codes.shape[1], device=codes.device))
        x = functional.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        if positions is not None:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
        return functional.linear(self.norm(x), self.token.weight, self.bias)
