"""Convolutions of one, two and three dimensions: every output position is a row that sees one patch of the input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.capture.factors import PIECE, Statistics, gradient_sum, gram, input_sums, wide_dtype, with_bias
from lightning_soo.capture.grids import Grid, output_sizes
from lightning_soo.capture.registry import LayerPart, LayerRule, register


class ConvolutionRule(LayerRule):
    """One part for each group; strides, dilation, and every padding and padding mode (Grosse and Martens 2016).

    With ``positions`` both factors are of a grid of output positions. The input factor is normalised by its own number
    of rows; the gradient factor, a sum over positions, is multiplied by how many each of them stands for.
    """

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def parts(self, module: Any) -> list[LayerPart]:
        size = module.out_channels // module.groups
        taps = math.prod(module.kernel_size)
        return [
            LayerPart(
                key=f"group{group}" if module.groups > 1 else "",
                weight="weight",
                bias="bias" if module.bias is not None else None,
                rows=(group * size, (group + 1) * size),
                inputs=module.in_channels // module.groups * taps,
                taps=taps,
            )
            for group in range(module.groups)
        ]

    def input_sums(
        self, module: Any, part: LayerPart, values: Tensor, batch: int, how: Statistics
    ) -> tuple[tuple[Tensor, ...], int]:
        """As of any layer, a few examples at a time: patches are as many times the input as the kernel has taps."""
        values = self._own(module, part, values)
        dtype = wide_dtype(values.dtype)
        if how.gram_dtype is not None and how.approximation == "expand":
            values = values.to(how.gram_dtype)  # before it is copied for every tap
        padded = pad(values, module)
        grid = Grid.of(output_sizes(padded, module), how)
        size = math.prod(grid.kept) * part.inputs * values.element_size()
        total: tuple[Tensor, ...] = ()
        count = 0
        for piece in torch.split(padded, max(1, PIECE // max(size, 1))):
            if how.approximation == "expand" and part.input_shape is None and not part.diagonal_inputs:
                found, rows = self._dense_sum(module, part, piece, grid, dtype, how)
            else:
                found, rows = input_sums(patches(piece, module, grid).to(dtype), part, how)
            total = tuple(a.add_(b) for a, b in zip(total, found, strict=True)) if total else found
            count += rows
        return total, count

    def gradient_sum(
        self, module: Any, part: LayerPart, values: Tensor | None, gradient: Tensor, batch: int, how: Statistics
    ) -> Tensor:
        if how.approximation != "expand" or part.diagonal_outputs:
            return gradient_sum(self.gradients(module, part, gradient, batch), part, how)
        if gradient.ndim == len(module.kernel_size) + 1:
            gradient = gradient[None]
        grid = Grid.of(gradient.shape[2:], how)
        own = gradient[(slice(None), slice(*part.rows), *grid.slices)]
        rows = own.transpose(0, 1).flatten(1).T  # a channel's positions stay together: no strided copy
        return gram(rows, wide_dtype(rows.dtype), how.gram_dtype).mul_(math.prod(grid.steps))

    def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        return patches(pad(self._own(module, part, values), module), module)

    def gradients(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        if values.ndim == len(module.kernel_size) + 1:
            values = values[None]
        return values[:, part.rows[0] : part.rows[1]].flatten(2).transpose(1, 2)

    def _own(self, module: Any, part: LayerPart, values: Tensor) -> Tensor:
        """The channels of the part's group, with a dimension of examples."""
        if values.ndim == len(module.kernel_size) + 1:
            values = values[None]
        channels = module.in_channels // module.groups
        first = part.rows[0] // part.outputs * channels
        return values[:, first : first + channels]

    def _dense_sum(
        self, module: Any, part: LayerPart, padded: Tensor, grid: Grid, dtype: torch.dtype, how: Statistics
    ) -> tuple[tuple[Tensor, ...], int]:
        """With channels last a patch is copied in runs of them; the product is then put in the weight's order."""
        rows = patches(padded, module, grid, channels_last=True).flatten(0, 1)
        product = gram(rows, dtype, how.gram_dtype)
        channels = part.inputs // part.taps
        product = product.view(part.taps, channels, part.taps, channels).permute(1, 0, 3, 2)
        product = product.reshape(part.inputs, part.inputs)
        if part.joint_bias:
            product = with_bias(product, rows, part)
            means = product[-1, :-1].view(part.taps, channels).T.reshape(-1)
            product[-1, :-1] = product[:-1, -1] = means
        return (product,), rows.shape[0]


def pad(values: Tensor, module: Any) -> Tensor:
    """The input as the convolution sees it, ``(examples, channels, *size)``."""
    if module.padding_mode != "zeros":
        amounts = list(module._reversed_padding_repeated_twice)  # what the constructor has made of the padding
        return nn.functional.pad(values, amounts, mode=module.padding_mode) if any(amounts) else values
    amounts = []  # as the module has it now: dilation and padding of a pretrained backbone may be changed
    dimensions = zip(module.kernel_size, module.dilation, _paddings(module), strict=True)
    for size, dilation, given in reversed(list(dimensions)):
        total = dilation * (size - 1) if module.padding == "same" else 2 * given
        amounts += [total // 2, total - total // 2]
    return nn.functional.pad(values, amounts) if any(amounts) else values


def _paddings(module: Any) -> list[int]:
    """Of each dimension; words count as none."""
    return [0] * len(module.kernel_size) if isinstance(module.padding, str) else list(module.padding)


def patches(values: Tensor, module: Any, grid: Grid | None = None, *, channels_last: bool = False) -> Tensor:
    """What output positions see, ``(examples, positions, channels * prod(kernel))``.

    Args:
        values: padded, ``(examples, channels, *size)``.
        grid: which positions; None is all.
        channels_last: in the order of taps and then channels, else in the weight's, channels and then taps.
    """
    grid = grid or Grid.of(output_sizes(values, module), Statistics())
    if channels_last:
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    examples, channels = values.shape[:2]
    strides, kernel = values.stride(), module.kernel_size
    # of neighbouring output positions, and of neighbouring taps
    moves = [stride * step for stride, step in zip(strides[2:], module.stride, strict=True)]
    taps = [stride * dilation for stride, dilation in zip(strides[2:], module.dilation, strict=True)]
    order, order_strides = ([*kernel, channels], [*taps, strides[1]]) if channels_last else (
        [channels, *kernel], [strides[1], *taps]
    )  # fmt: skip
    view = torch.as_strided(
        values,
        [examples, *grid.kept, *order],
        [strides[0], *(move * step for move, step in zip(moves, grid.steps, strict=True)), *order_strides],
        values.storage_offset() + sum(move * offset for move, offset in zip(moves, grid.offsets, strict=True)),
    )
    return view.reshape(examples, math.prod(grid.kept), channels * math.prod(kernel))


register(ConvolutionRule())
