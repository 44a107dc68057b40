"""SOAP's preconditioner of one block (Vyas et al. 2024, arXiv 2409.11321): Adam in a basis of eigenvectors.

``D = Q [ (Q^T M Q) / (sqrt(E / c2) + eps) ] Q^T`` with ``E <- b2 E + (1 - b2) (Q^T G Q)^2``, ``G`` the gradient, ``M``
its running mean and ``Q`` the eigenvectors of Shampoo's statistics. ``M`` is kept unrotated and so needs nothing when
``Q`` changes; ``E`` is kept as it is, as in the authors' code. Before the first basis ``Q`` is the identity: AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_soo.linalg.products import multiply
from lightning_soo.placement.blocks import ArrayLayout, Block
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.refresh.jobs import Job, JobResult

if TYPE_CHECKING:
    from lightning_soo.optim.options import ShampooOptions


def orthogonal_iteration(matrix: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration: the ``Q`` of ``(A + r I) Q_0 = Q R`` with a positive diagonal of ``R``.

    The ridge ``r`` stands above rounding: without it the basis of the null space of a statistic would be noise, another
    one at every world size; with it that part of the basis stays where it is.

    Args:
        matrix: ``(n, n)``, symmetric positive semi-definite.
        basis: ``(n, n)``, orthonormal to its precision.
    """
    largest = matrix.diagonal().amax()
    ridge = largest * max(1e-5, 1e4 * torch.finfo(matrix.dtype).eps)
    product = torch.addmm(basis * ridge, matrix, basis)
    # the scale does not matter, and extreme gradients must not overflow
    orthonormal: Tensor
    orthonormal, upper = torch.linalg.qr(product / largest.clamp_min(torch.finfo(matrix.dtype).tiny))
    signs = torch.ones_like(largest).copysign(upper.diagonal())
    return orthonormal * signs


@dataclass
class EigenbasisBlock(KroneckerBlock):
    """Everything known about one block on this rank; ``roots`` are its eigenbases, ``(n, n)`` each.

    Attributes:
        second_moment: ``E``, of the block's shape, where the block is applied.
        second_moment_weight: sum of the weights in it, ``1 - b2^t``.
    """

    has_exponent: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = True
    ready: bool = True  # the identity is a basis
    second_moment: Tensor | None = None
    second_moment_weight: float = 0.0

    @classmethod
    def root_layouts(cls, block: Block) -> tuple[ArrayLayout, ...]:
        """One basis for each of :attr:`Block.diagonals`."""
        return tuple(ArrayLayout((order, order)) for order in block.orders)

    def restart(self) -> None:
        """As if no gradient had been seen."""
        super().restart()
        self.second_moment, self.second_moment_weight = None, 0.0

    @property
    def state_bytes(self) -> int:
        """What this rank holds of the block."""
        moment = self.second_moment
        return super().state_bytes + (moment.numel() * moment.element_size() if moment is not None else 0)

    def refresh_in_place(self, statistics: KroneckerStatistics, options: ShampooOptions) -> JobResult | None:
        """One power iteration from the current basis, where that is asked for and there is one."""
        if options.basis != "qr" or self.roots is None:
            return None
        begin = time.perf_counter()
        bases = [
            orthogonal_iteration(matrix, basis.to(matrix.dtype))
            for matrix, basis in zip(statistics.matrices, self.roots, strict=True)
        ]
        arrays = tuple(basis.cpu().numpy() for basis in bases)
        return JobResult(arrays=arrays, diagnostics={}, seconds=time.perf_counter() - begin)

    def job(self, statistics: KroneckerStatistics, options: ShampooOptions) -> Job:
        # rounding of the statistics moves eigenvalues by about this much, relative to the largest
        tolerance = max(self.block.orders) * torch.finfo(self.statistics_dtype).eps
        return Job(
            function="lightning_soo.linalg.eigenbases:eigenbases",
            separate="lightning_soo.linalg.eigenbases:separate_bases",
            arrays=(),
            options={"tolerance": tolerance},
            result_bytes=sum(8 * matrix.numel() for matrix in statistics.matrices),
        )

    def working_state(self) -> tuple[Sequence[Tensor], float] | None:
        """The bases and the second moment, and the sum of the weights in that."""
        if self.roots is None or self.second_moment is None:
            return None
        return [*self.roots, self.second_moment], self.second_moment_weight

    def set_working_state(self, tensors: Sequence[Tensor], number: float) -> None:
        *self.roots, self.second_moment = tensors
        self.second_moment_weight = number

    def precondition(
        self, filtered: Tensor, gradient: Tensor | None = None, group: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return the direction of a running mean and advance the second moment by ``gradient``."""
        assert gradient is not None and group is not None
        beta2 = float(group["betas"][1])
        projected = self._rotate(gradient, forward=True).to(self.statistics_dtype)
        if self.second_moment is None:
            self.second_moment = torch.zeros_like(projected, memory_format=torch.contiguous_format)
        self.second_moment.mul_(beta2).addcmul_(projected, projected, value=1.0 - beta2)
        self.second_moment_weight = self.second_moment_weight * beta2 + 1.0 - beta2
        direction = self._rotate(filtered, forward=True).to(self.statistics_dtype)
        direction = direction / (self.second_moment / self.second_moment_weight).sqrt_().add_(float(group["eps"]))
        return self._rotate(direction, forward=False)

    def _rotate(self, tensor: Tensor, *, forward: bool) -> Tensor:
        """Into the basis, ``Q^T X Q``, or out of it; as it is where there is none yet."""
        if self.roots is None:
            return tensor
        bases = [basis.mT if forward else basis for basis in self.roots]
        return multiply(tensor.to(self.compute_dtype), self.block.dims, bases, ranges=self.block.diagonals)
