"""The encoder-decoder Transformer (Vaswani et al. 2017), norms before each part. Nothing here knows of sharding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention of ``x`` to ``memory``, to itself where they are the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """Args: mask: True where a position of ``memory`` may be seen, of shape [batch, 1, 1, length]."""
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(x), self.key(memory), self.value(memory))
        )
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.out(seen.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.cross_attention = Attention(width, heads), Attention(width, heads)
        self.feed_forward = FeedForward(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm1(x)
        # targets are padded behind their end: what is causal does not see padding
        x = x + self.dropout(self.attention(normed, normed, None, causal=True))
        x = x + self.dropout(self.cross_attention(self.norm2(x), memory, mask))
        return x + self.dropout(self.feed_forward(self.norm3(x)))


class Transformer(nn.Module):
    """
    Args:
        vocabulary: of both languages together.
        tied: one matrix for sources, targets and output, else three.
        padding: the token that stands for none.
    """

    _no_split_modules = ("EncoderLayer", "DecoderLayer")

    def __init__(
        self,
        vocabulary: int,
        width: int,
        hidden: int,
        heads: int,
        layers: int,
        length: int,
        *,
        dropout: float = 0.0,
        tied: bool = True,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.padding, self.scale = padding, math.sqrt(width)
        self.source = nn.Embedding(vocabulary, width)
        self.target = self.source if tied else nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, hidden, heads, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, hidden, heads, dropout) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, vocabulary, bias=not tied)
        if tied:
            self.output.weight = self.source.weight
        self.register_buffer("positions", sinusoids(length, width), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in {self.source, self.target}:
            nn.init.normal_(embedding.weight, std=1 / self.scale)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the token after each of ``target``; both are [batch, length] of token numbers."""
        mask = (source != self.padding)[:, None, None, :]
        memory = self.embed(self.source, source)
        for layer in self.encoder:
            memory = layer(memory, mask)
        memory = self.encoder_norm(memory)
        x = self.embed(self.target, target)
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return self.output(self.decoder_norm(x))

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        return self.dropout(self.scale * embedding(tokens) + self.positions[: tokens.shape[1]])


def sinusoids(length: int, width: int) -> Tensor:
    """Sines in even columns, cosines in odd ones, of wave lengths from 2 pi to 10000 * 2 pi."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
