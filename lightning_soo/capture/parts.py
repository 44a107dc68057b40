"""What has one pair of factors, and the shapes of the two."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """A weight and perhaps its bias, or some rows of both (a group, q, k or v).

    As a matrix it is ``(outputs, inputs)``, with the bias as one more column where ``joint_bias``.

    Attributes:
        key: what follows the module's name where it has several parts, else empty.
        weight, bias: names of the module's parameters.
        rows: of the weight as a matrix ``(outputs, inputs)``.
        bias_rows: of the bias; None is ``rows``.
        taps: of a convolution's kernel: its inputs are ``(channels, taps)``.
        transposed: whether the weight is stored as ``(inputs, outputs)``.
        structure: ``"dense"``: two full factors; ``"diagonal"``: the input factor is one (embeddings); ``"unit"``: no
            input factor, and for each output a small matrix between its scale and shift.
        input_shape: ``(c, s)`` where the input factor is itself a Kronecker product, of what the inputs are as a
            ``(c, s)`` matrix (channels and space); the bias is not in it.
        diagonal_inputs: only the diagonal of a dense part's input factor; the bias is not in it.
        diagonal_outputs: only the diagonal of the gradient factor.
    """

    key: str = ""
    weight: str
    bias: str | None
    rows: tuple[int, int]
    bias_rows: tuple[int, int] | None = None
    inputs: int
    taps: int = 1
    transposed: bool = False
    structure: str = "dense"
    input_shape: tuple[int, int] | None = None
    diagonal_inputs: bool = False
    diagonal_outputs: bool = False

    @property
    def outputs(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def joint_bias(self) -> bool:
        """Whether the bias is the input factor's last column, a constant one."""
        is_full = self.structure == "dense" and self.input_shape is None and not self.diagonal_inputs
        return is_full and self.bias is not None

    @property
    def columns(self) -> int:
        """The inputs, and the bias where it is one of them."""
        return self.inputs + self.joint_bias

    @property
    def input_factors(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what makes up the input factor: one matrix, one diagonal, two matrices ``(c, c)`` and ``(s, s)``,
        or nothing (``"unit"``)."""
        if self.structure == "unit":
            return ()
        if self.structure == "diagonal" or self.diagonal_inputs:
            return ((self.inputs,),)
        if self.input_shape is not None:
            channels, space = self.input_shape
            return (channels, channels), (space, space)
        return ((self.columns, self.columns),)

    @property
    def gradient_factor(self) -> tuple[int, ...]:
        """Shape of the gradient factor: ``(outputs, outputs)``, its diagonal, or ``(outputs, k, k)`` of ``"unit"``."""
        if self.structure == "unit":
            order = 1 + (self.bias is not None)
            return self.outputs, order, order
        return (self.outputs,) if self.diagonal_outputs else (self.outputs, self.outputs)


def limit_part(part: LayerPart, max_order: int, input_shape: tuple[int, int] | None = None) -> LayerPart:
    """The part with no factor above ``max_order``.

    An input factor above it is the product of two: of ``input_shape`` if given, else of channels and taps, else of the
    two divisors nearest to each other; where one of those is still too large, and that is so of prime numbers, only
    its diagonal remains. Of a gradient factor above it too.

    Raises:
        ValueError: ``input_shape`` does not have that many inputs.
    """
    if input_shape is not None and math.prod(input_shape) != part.inputs:
        raise ValueError(f"input shape {tuple(input_shape)} is not one of {part.inputs} inputs")
    if part.structure == "unit":
        return part
    if part.structure == "dense" and part.inputs > max_order:
        if input_shape is not None:
            part = replace(part, input_shape=(input_shape[0], input_shape[1]))
        else:
            shapes = [(part.inputs // part.taps, part.taps)] if part.taps > 1 else []
            fitting = [shape for shape in (*shapes, _near_square(part.inputs)) if max(shape) <= max_order]
            part = replace(part, input_shape=fitting[0]) if fitting else replace(part, diagonal_inputs=True)
    return replace(part, diagonal_outputs=True) if part.outputs > max_order else part


def _near_square(number: int) -> tuple[int, int]:
    """Its divisor pair with the least sum, the larger first."""
    smaller = next(divisor for divisor in range(math.isqrt(number), 0, -1) if number % divisor == 0)
    return number // smaller, smaller
