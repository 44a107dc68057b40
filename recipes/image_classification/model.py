"""ResNet-20 for small pictures (He et al. 2015, section 4.2), with or without BatchNorm.

Without it convolutions have biases, and the second one of each residual branch is scaled at the start by the number of
branches to the power -1/2, so that activations neither grow nor vanish with depth (Hayou et al. 2021, Stable ResNet,
arXiv:2010.12859). Zero there, as in Fixup, would leave the channels that a shortcut adds at zero for ever: a ReLU's
derivative at zero is zero. Every parameter belongs to a convolution or to the linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

STAGES, BLOCKS = 3, 3  # 3 stages of 3 blocks of 2 convolutions, the first convolution and the classifier: 20 layers


def normalized(channels: int, normalization: str) -> nn.Module:
    return nn.BatchNorm2d(channels) if normalization == "batch" else nn.Identity()


def convolution(inputs: int, outputs: int, stride: int, normalization: str) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=normalization == "none")


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: where it changes shape, every second pixel and zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int, normalization: str) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, stride, normalization)
        self.first_norm = normalized(outputs, normalization)
        self.second = convolution(outputs, outputs, 1, normalization)
        self.second_norm = normalized(outputs, normalization)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.relu(self.first_norm(self.first(x)))
        branch = self.second_norm(self.second(branch))
        if self.stride > 1 or self.added:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return torch.relu(x + branch)


class ResNet20(nn.Module):
    """Args: channels: of the pictures. width: channels of the first stage, 16 in the paper; it doubles twice."""

    def __init__(self, channels: int, classes: int, width: int = 16, normalization: str = "batch") -> None:
        if normalization not in ("batch", "none"):
            raise ValueError(f"normalization is {normalization!r}; it may be 'batch' or 'none'")
        super().__init__()
        self.stem = convolution(channels, width, 1, normalization)
        self.stem_norm = normalized(width, normalization)
        blocks: list[Block] = []
        inputs = width
        for stage in range(STAGES):
            for index in range(BLOCKS):
                outputs = width * 2**stage
                blocks.append(Block(inputs, outputs, 2 if stage and not index else 1, normalization))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, classes)
        self.initialize(normalization)

    @torch.no_grad()
    def initialize(self, normalization: str) -> None:
        """He et al.'s initialisation; where nothing normalises, by inputs, and smaller at the end of branches."""
        mode = "fan_out" if normalization == "batch" else "fan_in"
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.classifier.bias)
        if normalization == "none":
            for block in self.blocks:
                block.second.weight.mul_(len(self.blocks) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(images)))
        return self.classifier(self.blocks(x).mean((2, 3)))
