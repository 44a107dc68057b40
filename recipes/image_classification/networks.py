"""The network that a run's settings ask for."""

from __future__ import annotations

from model import ResNet20
from resnet50 import ResNet50
from settings import Settings
from torch import nn
from vit import VisionTransformer


def make_network(settings: Settings, channels: int, classes: int, pixels: int) -> nn.Module:
    """Args: channels, pixels: of the pictures, which are square.

    Raises:
        SystemExit: settings that the model does not have.
    """
    if settings.model == "resnet20":
        return ResNet20(channels, classes, settings.width, settings.normalization)
    if settings.normalization == "none":
        raise SystemExit(f"--normalization none is for --model resnet20, not {settings.model}")
    if settings.model == "resnet50":
        return ResNet50(channels, classes, pixels, settings.width)
    try:
        return VisionTransformer(
            channels, classes, pixels, settings.patch, settings.width, settings.depth, settings.heads
        )
    except ValueError as error:
        raise SystemExit(f"--model vit: {error}") from error
