"""Scales and shifts of normalisation layers: each channel's 2 x 2 Fisher of its two numbers (Osawa et al. 2019)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_soo.capture.factors import Statistics, wide_dtype
from lightning_soo.capture.registry import LayerPart, LayerRule, by_example, register


class NormalizationRule(LayerRule):
    """``y = scale * normalised + shift``: a channel's two numbers are coupled with each other, not with other channels.

    Exact between the two numbers of a channel, since gradients of whole examples are formed; ``expand`` and ``reduce``
    are the same here.
    """

    kinds: ClassVar[tuple[type[nn.Module] | str, ...]] = (
        nn.LayerNorm,
        nn.RMSNorm,
        nn.GroupNorm,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
    )
    needs_input = True

    def parts(self, module: Any) -> list[LayerPart]:
        if module.weight is None:
            return []
        bias = "bias" if getattr(module, "bias", None) is not None else None
        return [LayerPart(weight="weight", bias=bias, rows=(0, _channels(module)), inputs=1, structure="unit")]

    def refusal(self, module: nn.Module) -> str:
        return "a normalisation without a scale"

    def input_sums(
        self, module: Any, part: LayerPart, values: Tensor, batch: int, how: Statistics
    ) -> tuple[tuple[Tensor, ...], int]:
        return (), 0

    def gradient_sum(
        self, module: Any, part: LayerPart, values: Tensor | None, gradient: Tensor, batch: int, how: Statistics
    ) -> Tensor:
        assert values is not None
        rows = self.gradients(module, part, gradient, batch)
        rows = rows.to(wide_dtype(rows.dtype))  # before thousands of scaled gradients are added up
        scales = (self.inputs(module, part, values, batch) * rows).sum(1)
        pair = torch.stack([scales, rows.sum(1)] if part.bias is not None else [scales], -1)
        return torch.einsum("nci,ncj->cij", pair, pair)

    def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        """The normalised input, ``(examples, positions, channels)``."""
        return self._by_channel(module, _normalised(module, values), batch)

    def gradients(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        return self._by_channel(module, values, batch)

    def _by_channel(self, module: Any, values: Tensor, batch: int) -> Tensor:
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return by_example(values.flatten(-len(module.normalized_shape)), batch)
        return values.reshape(values.shape[0], _channels(module), -1).transpose(1, 2)


def _channels(module: Any) -> int:
    # not of the weight: ZeRO-3 leaves none of it between passes
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return math.prod(module.normalized_shape)
    return int(module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features)


def _normalised(module: Any, values: Tensor) -> Tensor:
    """What the scale multiplies."""
    if isinstance(module, nn.LayerNorm):
        return nn.functional.layer_norm(values, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return nn.functional.rms_norm(values, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return nn.functional.group_norm(values, module.num_groups, eps=module.eps)
    if module.training or module.running_mean is None:
        return nn.functional.batch_norm(values, None, None, training=True, eps=module.eps)
    return nn.functional.batch_norm(values, module.running_mean, module.running_var, eps=module.eps)


register(NormalizationRule())
