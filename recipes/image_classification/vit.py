"""Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929): patches as words, pre-norm blocks, a class token.

Without dropout. With 224 pixels, patches of 16, width 768, depth 12 and 12 heads it is ViT-B/16.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class EncoderBlock(nn.Module):
    """Self-attention and feed-forward, each of the normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        attended = nn.functional.scaled_dot_product_attention(*split.permute(2, 0, 3, 1, 4))
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed_forward(self.feed_forward_norm(x))


class VisionTransformer(nn.Module):
    """Args: channels, pixels: of the pictures, which are square. width: of the embedding.

    Raises:
        ValueError: `patch` does not divide `pixels`, or `heads` does not divide `width`.
    """

    _no_split_modules: ClassVar[list[str]] = ["EncoderBlock"]

    def __init__(
        self, channels: int, classes: int, pixels: int, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4
    ) -> None:
        if pixels % patch:
            raise ValueError(f"patches of {patch} do not divide pictures of {pixels} rows")
        if width % heads:
            raise ValueError(f"{heads} heads do not divide the width {width}")
        super().__init__()
        self.embedding = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, 1 + (pixels // patch) ** 2, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.classifier = nn.Linear(width, classes)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Glorot and Bengio's in the blocks, LeCun's for the patches; the classifier begins at zero."""
        nn.init.normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.embedding.weight, std=self.embedding.weight[0].numel() ** -0.5)
        nn.init.zeros_(self.embedding.bias)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(patches), -1, -1), patches], 1) + self.position
        return self.classifier(self.norm(self.blocks(x))[:, 0])
