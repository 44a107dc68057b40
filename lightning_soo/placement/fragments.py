"""What one rank holds of one parameter: consecutive elements of the row-major parameter.

True of every engine: all of it (one device, DDP), whole rows (FSDP2), or a slice cut anywhere (FSDP1, ZeRO).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import torch

_WRAPPER_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements ``[start, stop)`` of a parameter's row-major order; none where this rank holds nothing of it.

    Attributes:
        name: canonical name of the parameter.
        shape: the parameter's true shape.
        tensor: what the optimizer updates: the parameter, a DTensor, a view of a flat shard, or a whole flat shard.
        offset: of element ``start`` in ``tensor``'s local elements.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: torch.Tensor
    offset: int = 0

    def __post_init__(self) -> None:
        numel = math.prod(self.shape)
        if not 0 <= self.start <= self.stop <= numel:
            raise ValueError(
                f"fragment of {self.name!r}: [{self.start}, {self.stop}) is not inside its {numel} elements"
            )

    @cached_property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop == math.prod(self.shape)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's part of ``tensor``, which is laid out like the fragment's own (a gradient, a moment).

        Returns:
            A view: the tensor itself where it is the whole parameter, of the parameter's shape where the fragment is
            whole, else one-dimensional.
        """
        tensor = to_local(tensor)
        if self.is_whole and tensor.shape == self.shape:
            return tensor
        flat = tensor.view(-1)[self.offset : self.offset + self.stop - self.start]
        return flat.view(self.shape) if self.is_whole else flat


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The elements that this rank holds of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def canonical_name(name: str) -> str:
    """Drop the prefixes that wrappers add (DDP, torch.compile, FSDP1, activation checkpointing)."""
    return _WRAPPER_PREFIXES.sub("", name)


def module_name(path: str) -> str:
    """A module's canonical name; wrappers have that of what they wrap."""
    return canonical_name(f"{path}.x" if path else "x").removesuffix("x").removesuffix(".")
