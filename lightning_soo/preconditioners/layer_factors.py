"""K-FAC's preconditioner of one layer (Martens and Grosse 2015): ``(G (x) A + lambda I)^-1`` on its weight and bias.

The gradient is ``V``, ``(outputs, inputs)`` with the bias as one more column; ``A`` may be a diagonal (embeddings), or
channels times space (Ba, Grosse and Martens 2017), and ``G`` a diagonal where it would be too large. Scales and shifts
have a small matrix for each channel. Pure tensors: no process group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from lightning_soo.linalg.products import multiply
from lightning_soo.placement.blocks import ArrayLayout, Block
from lightning_soo.placement.layers import LayerBlock
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.refresh.jobs import Job

if TYPE_CHECKING:
    from lightning_soo.optim.options import ShampooOptions


@dataclass
class LayerFactorsBlock(KroneckerBlock):
    """Everything known about one layer on this rank.

    Statistics are running means of the factors. Roots of ``damping_method="exact"`` are the eigenvectors of each factor
    that is no diagonal, then the eigenvalues of each; of ``"pi"`` the damped inverse of each.

    Attributes:
        damping: ``lambda``, as it is now; the exact form takes it at every step, ``"pi"`` at a refresh.
    """

    has_exponent: ClassVar[bool] = False
    stackable: ClassVar[bool] = False
    damping: float = 0.0

    @property
    def layer(self) -> LayerBlock:
        return cast(LayerBlock, self.block)

    @classmethod
    def statistics_layouts(cls, block: Block) -> tuple[ArrayLayout, ...]:
        """The factors."""
        return tuple(ArrayLayout(shape, symmetric=len(shape) == 2) for shape in cast(LayerBlock, block).factors)

    @classmethod
    def root_layouts(cls, block: Block) -> tuple[ArrayLayout, ...]:
        """Inverses like the factors, or eigenvectors and eigenvalues."""
        layer = cast(LayerBlock, block)
        if layer.damping_method == "pi":
            return cls.statistics_layouts(block)
        vectors = [ArrayLayout(shape) for shape in layer.factors if len(shape) > 1]
        return (*vectors, *(ArrayLayout(shape[: max(1, len(shape) - 1)]) for shape in layer.factors))

    def select(self, inputs: Sequence[Tensor], gradients: Tensor) -> list[Tensor]:
        """This block's part of what a layer has captured, as :meth:`statistics_layouts` says.

        A bias that is not preconditioned with its weight leaves the input factor's last column out.
        """
        layer = self.layer
        if layer.is_unit:  # of scale and shift
            count = layer.factors[0][1]
            first = 0 if layer.columns else gradients.shape[1] - 1
            return [gradients[:, first : first + count, first : first + count]]
        shapes = layer.factors[1:]
        if not shapes:
            return [gradients]
        return [
            gradients,
            *(factor[tuple(slice(0, size) for size in shape)] for factor, shape in zip(inputs, shapes, strict=True)),
        ]

    def update(self, factors: Sequence[Tensor], *, decay: float, weight: float) -> None:
        """``F <- decay F + weight F_new`` for every factor."""
        assert self.statistics is not None
        for own, new in zip(self.statistics.matrices, factors, strict=True):
            own.mul_(decay).add_(new, alpha=weight)

    def job(self, statistics: KroneckerStatistics, options: ShampooOptions) -> Job:
        """What a worker computes of the factors, but for its arrays: they are brought to the host first."""
        pi = self.layer.damping_method == "pi"
        return Job(
            function=f"lightning_soo.linalg.damped_inverses:{'factored_inverses' if pi else 'eigen_decompositions'}",
            arrays=(),
            options={"divisor": self.weight, **({"damping": self.damping} if pi else {})},
            result_bytes=sum(8 * (math.prod(layout.shape) + 1) for layout in self.root_layouts(self.block)),
        )

    def direction(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The direction of the layer's gradient (or of its running mean).

        Args:
            weight: of the block's shape.
            bias: its part of the bias, where that is preconditioned with the weight.

        Returns:
            The directions of both, in ``compute_dtype``, and their inner product with what was given, a scalar.
        """
        layer = self.layer
        # (outputs, inputs); of scales and shifts (channels, 2)
        matrix = weight.T if layer.transposed else weight
        columns = matrix[:, None] if layer.is_unit or matrix.ndim == 1 else matrix
        if bias is not None:
            columns = torch.cat([columns, bias.to(columns.dtype)[:, None]], 1)
        given = columns.to(self.compute_dtype)
        found = self._exact(given) if layer.damping_method == "exact" else self._pi(given)
        product = torch.sum(found * given, dtype=torch.float32 if given.dtype != torch.float64 else None)
        if bias is not None:
            found, of_bias = found[:, :-1], found[:, -1]
        else:
            of_bias = None
        found = found.T if layer.transposed else found
        return found.reshape(weight.shape), of_bias, product

    def _exact(self, given: Tensor) -> Tensor:
        """``Q [(Q^T V Q) / (d d^T + lambda)] Q^T`` over all factors."""
        assert self.roots is not None
        shapes = self.layer.factors
        count = sum(len(shape) > 1 for shape in shapes)
        vectors, values = self.roots[:count], self.roots[count:]
        if self.layer.is_unit:
            rotated = torch.einsum("cij,ci->cj", vectors[0], given) / (values[0] + self.damping)
            return torch.einsum("cij,cj->ci", vectors[0], rotated)
        tensor = given.reshape([shape[0] for shape in shapes] if len(shapes) > 1 else given.shape)
        dims = [dim for dim, shape in enumerate(shapes) if len(shape) > 1]
        rotated = multiply(tensor, dims, [basis.T for basis in vectors])
        eigenvalues = values[0]
        for value in values[1:]:
            eigenvalues = eigenvalues[..., None] * value
        eigenvalues = eigenvalues + self.damping
        rotated = rotated / (eigenvalues if len(shapes) > 1 else eigenvalues[:, None])
        return multiply(rotated, dims, vectors).reshape(given.shape)

    def _pi(self, given: Tensor) -> Tensor:
        """The damped inverse of every factor along its dimension."""
        assert self.roots is not None
        shapes = self.layer.factors
        if self.layer.is_unit:
            return torch.einsum("cij,cj->ci", self.roots[0], given)
        tensor = given.reshape([shape[0] for shape in shapes] if len(shapes) > 1 else given.shape)
        for dim, (shape, inverse) in enumerate(zip(shapes, self.roots, strict=True)):
            if len(shape) > 1:
                tensor = multiply(tensor, [dim], [inverse])
            else:
                tensor = tensor * inverse.reshape([-1 if other == dim else 1 for other in range(tensor.ndim)])
        return tensor.reshape(given.shape)
