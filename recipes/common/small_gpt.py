"""A small GPT over characters, as any LightningModule: nothing in it knows of sharding or of second order."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from windows import VOCABULARY


class Layer(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed_forward(self.norm2(x))


class SmallGPT(L.LightningModule):
    """Trained by AdamW, as far as it knows."""

    _no_split_modules = ("Layer",)  # what Accelerate's FSDP makes a unit; Transformers' models have it too

    def __init__(
        self,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
        length: int = 64,
        lr: float = 2e-3,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.token(codes) + self.position(torch.arange(codes.shape[1], device=codes.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

    def loss(self, codes: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("validation_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
