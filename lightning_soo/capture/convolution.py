"""Convolutions of one, two and three dimensions: every output position is a row that sees one patch of the input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.capture.factors import PIECE
from lightning_soo.capture.registry import LayerPart, LayerRule, register


class ConvolutionRule(LayerRule):
    """One part for each group; strides, dilation, and every padding and padding mode (Grosse and Martens 2016)."""

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def parts(self, module: Any) -> list[LayerPart]:
        size = module.out_channels // module.groups
        inputs = module.in_channels // module.groups * math.prod(module.kernel_size)
        return [
            LayerPart(
                key=f"group{group}" if module.groups > 1 else "",
                weight="weight",
                bias="bias" if module.bias is not None else None,
                rows=(group * size, (group + 1) * size),
                inputs=inputs,
            )
            for group in range(module.groups)
        ]

    def input_sum(
        self, module: Any, part: LayerPart, values: Tensor, batch: int, approximation: str
    ) -> tuple[Tensor | None, int]:
        """As of any layer, a few examples at a time: patches are as many times the input as the kernel has taps."""
        if values.ndim == len(module.kernel_size) + 1:
            values = values[None]
        size = values[0].numel() * math.prod(module.kernel_size) * values.element_size()
        total: Tensor | None = None
        count = 0
        for piece in torch.split(values, max(1, PIECE // max(size, 1))):
            found, rows = super().input_sum(module, part, piece, len(piece), approximation)
            assert found is not None
            total, count = found if total is None else total.add_(found), count + rows
        return total, count

    def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        channels = module.in_channels // module.groups
        first = part.rows[0] // part.outputs * channels
        dims = len(module.kernel_size)
        if values.ndim == dims + 1:  # an example without a batch dimension
            values = values[None]
        return patches(pad(values[:, first : first + channels], module), module)

    def gradients(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        if values.ndim == len(module.kernel_size) + 1:
            values = values[None]
        return values[:, part.rows[0] : part.rows[1]].flatten(2).transpose(1, 2)


def pad(values: Tensor, module: Any) -> Tensor:
    """The input as the convolution sees it, ``(examples, channels, *size)``."""
    # torch keeps it for its own use in the order of F.pad, resolved where padding is a word
    amounts = list(module._reversed_padding_repeated_twice)
    if not any(amounts):
        return values
    mode = module.padding_mode if module.padding_mode != "zeros" else "constant"
    return nn.functional.pad(values, amounts, mode=mode)


def patches(values: Tensor, module: Any) -> Tensor:
    """What each output position sees, ``(examples, positions, channels * prod(kernel))`` in the weight's order.

    Args:
        values: padded, ``(examples, channels, *size)``.
    """
    examples, channels, *sizes = values.shape
    strides = values.stride()
    kernel, step, dilation = module.kernel_size, module.stride, module.dilation
    outputs = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(sizes, kernel, step, dilation, strict=True)]
    view = torch.as_strided(
        values,
        [examples, *outputs, channels, *kernel],
        [
            strides[0],
            *(stride * s for stride, s in zip(strides[2:], step, strict=True)),
            strides[1],
            *(stride * d for stride, d in zip(strides[2:], dilation, strict=True)),
        ],
        values.storage_offset(),
    )
    return view.reshape(examples, math.prod(outputs), channels * math.prod(kernel))


register(ConvolutionRule())
