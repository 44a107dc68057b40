"""DLRM (Naumov et al. 2019, arXiv 1906.00091): two MLPs, embedding tables, and dot products between all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, and after the last one if ``activate_last``."""

    def __init__(self, sizes: Sequence[int], *, activate_last: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activate_last = activate_last
        for layer in self.layers:  # as in the authors' code
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (layer.in_features + layer.out_features)))
            nn.init.normal_(layer.bias, std=math.sqrt(1 / layer.out_features))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        x = self.layers[-1](x)
        return torch.relu(x) if self.activate_last else x


class DLRM(nn.Module):
    """
    Args:
        dense_features: numbers in an example.
        table_rows: of each table, one table a categorical feature.
        width: of an embedding, and of what the bottom MLP ends with.
        bottom: hidden sizes of the MLP of the dense features, before ``width``.
        top: hidden sizes of the MLP that ends in one logit.
    """

    _no_split_modules: ClassVar[list[str]] = ["MLP"]

    def __init__(
        self, dense_features: int, table_rows: Sequence[int], width: int, bottom: Sequence[int], top: Sequence[int]
    ) -> None:
        super().__init__()
        self.bottom = MLP([dense_features, *bottom, width], activate_last=True)
        # dense gradients: a batch touches few rows, but second-order optimizers refuse sparse ones
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in table_rows)
        for table in self.tables:
            bound = 1 / math.sqrt(table.num_embeddings)
            nn.init.uniform_(table.weight, -bound, bound)
        vectors = len(table_rows) + 1
        self.top = MLP([width + vectors * (vectors - 1) // 2, *top, 1], activate_last=False)
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        """Logits (N x 1) of dense features (N x D) and rows of the tables (N x T)."""
        first = self.bottom(dense)
        embedded = [table(categories[:, index]) for index, table in enumerate(self.tables)]
        vectors = torch.stack([first, *(e.to(first.dtype) for e in embedded)], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([first, products], 1))
