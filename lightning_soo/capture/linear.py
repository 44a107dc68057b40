"""Fully connected layers: torch's, and Hugging Face's ``Conv1D``, whose weight is stored as ``(inputs, outputs)``."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_soo.capture.registry import LayerPart, LayerRule, by_example, register


class LinearRule(LayerRule):
    """``y = W a + b`` at every position."""

    kinds: ClassVar[tuple[type[nn.Module] | str, ...]] = (nn.Linear,)

    def parts(self, module: Any) -> list[LayerPart]:
        bias = "bias" if module.bias is not None else None
        return [LayerPart(weight="weight", bias=bias, rows=(0, module.out_features), inputs=module.in_features)]

    def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        return by_example(values, batch)

    def gradients(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        return by_example(values, batch)


class TransposedLinearRule(LinearRule):
    """``y = a W + b``."""

    kinds = ("transformers.pytorch_utils:Conv1D",)

    def parts(self, module: Any) -> list[LayerPart]:
        return [LayerPart(weight="weight", bias="bias", rows=(0, module.nf), inputs=module.nx, transposed=True)]


register(LinearRule())
register(TransposedLinearRule())
