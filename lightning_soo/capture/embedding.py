"""Embeddings: the input is one of the rows, so the input factor is diagonal, the share of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.capture.factors import Statistics, wide_dtype
from lightning_soo.capture.registry import LayerPart, LayerRule, by_example, register


class EmbeddingRule(LayerRule):
    """The weight's rows are inputs: ``A = diag(counts) / positions``, exact for any text."""

    kinds = (nn.Embedding,)

    def parts(self, module: Any) -> list[LayerPart]:
        if self.refusal(module):
            return []
        return [
            LayerPart(
                weight="weight",
                bias=None,
                rows=(0, module.embedding_dim),
                inputs=module.num_embeddings,
                transposed=True,
                structure="diagonal",
            )
        ]

    def refusal(self, module: Any) -> str:
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return "an embedding with max_norm, scale_grad_by_freq or sparse gradients"
        return ""

    def input_sums(
        self, module: Any, part: LayerPart, values: Tensor, batch: int, how: Statistics
    ) -> tuple[tuple[Tensor, ...], int]:
        tokens = values.flatten()
        counts = torch.bincount(tokens, minlength=part.inputs).to(wide_dtype(module.weight.dtype))
        if module.padding_idx is not None:  # it never has a gradient
            counts[module.padding_idx] = 0
        return (counts,), tokens.numel()

    def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        """One-hot rows: for checks, too large for use."""
        rows = nn.functional.one_hot(values.flatten(), part.inputs).to(module.weight.dtype)
        if module.padding_idx is not None:
            rows[:, module.padding_idx] = 0
        return by_example(rows, batch)

    def gradients(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        return by_example(values, batch)


register(EmbeddingRule())
