"""What one rank holds of one parameter: consecutive elements of the row-major parameter.

True of every engine: all of it (one device, DDP), whole rows (FSDP2), or a slice cut anywhere (FSDP1, ZeRO).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

_WRAPPER_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements ``[start, stop)`` of a parameter's row-major order, at ``offset`` of ``tensor``'s storage order.

    Attributes:
        name: canonical name of the parameter.
        shape: the parameter's true shape.
        tensor: what the optimizer updates (the parameter itself on one device and under DDP).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: torch.Tensor
    offset: int = 0

    def __post_init__(self) -> None:
        numel = 1
        for size in self.shape:
            numel *= size
        if not 0 <= self.start <= self.stop <= numel:
            raise ValueError(
                f"fragment of {self.name!r}: [{self.start}, {self.stop}) is not inside its {numel} elements"
            )

    @property
    def is_whole(self) -> bool:
        numel = 1
        for size in self.shape:
            numel *= size
        return self.start == 0 and self.stop == numel


def canonical_name(name: str) -> str:
    """Drop the prefixes that wrappers add (DDP, torch.compile, FSDP1, activation checkpointing)."""
    return _WRAPPER_PREFIXES.sub("", name)
