"""Which layers have Kronecker factors, and how their inputs and output gradients are read.

A user extends it in a few lines::

    class ScaledLinearRule(LinearRule):
        kinds = (ScaledLinear,)

        def inputs(self, module, part, values, batch):
            return super().inputs(module, part, values * module.scale, batch)

    register(ScaledLinearRule())
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_soo.capture.factors import Statistics, gradient_sum, input_sums
from lightning_soo.capture.parts import LayerPart, limit_part

__all__ = ["LayerPart", "LayerRule", "Record", "by_example", "find_rule", "limit_part", "register", "tensors"]

# A use of a layer: its input, its output, and of the output's gradient what belongs to each of the parts that were used
# (None: all of it, to all parts).
Record = Callable[[Tensor, Tensor, Mapping[str, Callable[[Tensor], Tensor]] | None], None]


class LayerRule(ABC):
    """How one family of layers is captured.

    Attributes:
        kinds: module classes, or ``"module:name"`` of one whose package may not be there. The class must match exactly:
            a subclass that changes ``forward`` needs a rule of its own.
        covers_children: whether modules inside it are part of it and are not looked at by themselves.
        needs_input: whether the gradient's sum needs the input once more (autograd keeps it anyway).
    """

    kinds: ClassVar[tuple[type[nn.Module] | str, ...]]
    needs_input: ClassVar[bool] = False
    covers_children: ClassVar[bool] = False

    @abstractmethod
    def parts(self, module: nn.Module) -> list[LayerPart]:
        """The parts of a module; none where it cannot be captured (:meth:`refusal` says why)."""

    def input_sums(
        self, module: Any, part: LayerPart, values: Tensor, batch: int, how: Statistics
    ) -> tuple[tuple[Tensor, ...], int]:
        """Sums of shapes ``part.input_factors`` and the number of rows in them, from the module's first argument."""
        return input_sums(self.inputs(module, part, values, batch), part, how)

    def gradient_sum(
        self, module: Any, part: LayerPart, values: Tensor | None, gradient: Tensor, batch: int, how: Statistics
    ) -> Tensor:
        """The gradient factor's sum; ``values`` is the first argument where ``needs_input``."""
        return gradient_sum(self.gradients(module, part, gradient, batch), part, how)

    @abstractmethod
    def inputs(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        """Rows that multiply the weight: ``(examples, positions, part.inputs)`` of the module's first argument."""

    @abstractmethod
    def gradients(self, module: Any, part: LayerPart, values: Tensor, batch: int) -> Tensor:
        """Gradients of what the rows give: ``(examples, positions, part.outputs)`` of the output's gradient."""

    def watch(self, module: nn.Module, record: Record) -> list[RemovableHandle]:
        """Hang hooks on ``module`` that call ``record`` for each use; by default the first argument and the output."""

        def forward_hook(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            values = next(tensors((positional, named)), None)
            result = next((tensor for tensor in tensors(output) if tensor.requires_grad), None)
            if values is not None and result is not None:
                record(values, result, None)

        return [module.register_forward_hook(forward_hook, with_kwargs=True)]

    def refusal(self, module: nn.Module) -> str:
        """Why a module of this family has no parts; empty where it has."""
        return ""


_RULES: dict[type[nn.Module] | str, LayerRule] = {}


def register(rule: LayerRule) -> None:
    """Use ``rule`` for the classes it names, also in place of an earlier one."""
    for kind in rule.kinds:
        _RULES[kind] = rule


def find_rule(module: nn.Module) -> LayerRule | None:
    """The rule of a module's class; None where there is none."""
    kind = type(module)
    # fully_shard and replicate give a module a class made up of one of theirs and its own
    while len(kind.__bases__) == 2 and kind.__bases__[0].__module__.startswith("torch.distributed."):
        kind = kind.__bases__[1]
    return _RULES.get(kind) or _RULES.get(f"{kind.__module__}:{kind.__qualname__}")


def by_example(values: Tensor, batch: int) -> Tensor:
    """``(..., d)`` as ``(examples, positions, d)``.

    Where the second dimension is the batch (sequences first) it is brought forward; where the leading dimensions do not
    hold a whole number of positions for each example (packed tokens), each row counts as an example.
    """
    if values.ndim > 2 and values.shape[0] != batch and values.shape[1] == batch:
        values = values.transpose(0, 1)
    rows = values.numel() // max(values.shape[-1], 1)
    if batch < 1 or rows % batch:
        batch = rows
    return values.reshape(batch, -1, values.shape[-1])


def tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested arguments, in order: in lists, tuples, mappings (a tokenizer's batch) and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors(entry)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
