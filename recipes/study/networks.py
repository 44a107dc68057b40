"""The networks. Smooth activations, since two methods take second derivatives of the loss, and no BatchNorm.

Under BatchNorm the loss of an example depends on its batch: at every batch size a different function would be
minimised, and a Hessian of part of a batch would be that of yet another. GroupNorm without scale and shift keeps the
residual network trainable, and leaves every parameter in a layer that K-FAC covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def multilayer(widths: Sequence[int], linear: Sequence[int] = ()) -> nn.Sequential:
    """Fully connected layers with tanh between them, Glorot's initialisation.

    Args:
        widths: of inputs, hidden layers and outputs.
        linear: layers, by number, that are followed by no activation besides the last.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for index, (inputs, outputs) in enumerate(pairwise(widths)):
        layer = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers.append(layer)
        if index < len(widths) - 2 and index not in linear:
            layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # SiLU's gain is near ReLU's
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: where it changes shape, every second pixel and zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = convolution(inputs, outputs, stride), convolution(outputs, outputs)
        self.first_norm = nn.GroupNorm(2, outputs, affine=False)
        self.second_norm = nn.GroupNorm(2, outputs, affine=False)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        branch = nn.functional.silu(self.first_norm(self.first(x)))
        branch = self.second_norm(self.second(branch))
        if self.stride > 1 or self.added:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return nn.functional.silu(x + branch)


class ResNet(nn.Module):
    """He et al. (2015), section 4.2, in small.

    Args:
        width: channels of the first stage; every stage has twice those of the one before.
        blocks: of each stage.
        stride: of the first convolution.
    """

    def __init__(self, width: int, blocks: Sequence[int], stride: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = convolution(1, width, stride)
        self.stem_norm = nn.GroupNorm(2, width, affine=False)
        made, inputs = list[Block](), width
        for stage, count in enumerate(blocks):
            for index in range(count):
                outputs = width * 2**stage
                made.append(Block(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*made)
        self.classifier = nn.Linear(inputs, classes)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.silu(self.stem_norm(self.stem(images)))
        return self.classifier(self.blocks(x).mean((2, 3)))
