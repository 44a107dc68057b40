"""ResNet-50 (He et al. 2015, table 1), with the stride in the 3 x 3 convolutions as in everybody's figures today.

Its first layers quarter the rows and columns of pictures of more than 64 pixels; smaller ones keep theirs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

STAGES = (3, 4, 6, 3)  # blocks of three convolutions; with the first and the classifier 50 layers
EXPANSION = 4


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """With BatchNorm after it."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, and a shortcut that is one of 1 x 1 where shapes change."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.reduce = convolution(inputs, width, 1)
        self.middle = convolution(width, width, 3, stride)
        self.expand = convolution(width, outputs, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.relu(self.middle(torch.relu(self.reduce(x))))
        return torch.relu(self.shortcut(x) + self.expand(branch))


class ResNet50(nn.Module):
    """Args: channels, pixels: of the pictures. width: of the first stage, 64 in the paper; it doubles three times."""

    _no_split_modules: ClassVar[list[str]] = ["Bottleneck"]

    def __init__(self, channels: int, classes: int, pixels: int, width: int = 64) -> None:
        super().__init__()
        if pixels > 64:
            self.stem = nn.Sequential(convolution(channels, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
        else:
            self.stem = nn.Sequential(convolution(channels, width, 3), nn.ReLU())
        blocks, inputs = [], width
        for stage, count in enumerate(STAGES):
            for index in range(count):
                blocks.append(Bottleneck(inputs, width * 2**stage, 2 if stage and not index else 1))
                inputs = EXPANSION * width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, classes)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """He et al.'s; the last BatchNorm of each branch begins at zero (Goyal et al. 2017, arXiv:1706.02677)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for block in self.blocks:
            nn.init.zeros_(block.expand[1].weight)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))
