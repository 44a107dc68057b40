"""Shampoo's Kronecker-factored preconditioner of one block (Gupta et al. 2018; Anil et al. 2020, section 3).

For a block ``G`` with preconditioned dimensions ``i``, ``A_i <- b2 A_i + (1 - b2) unfold_i(G) unfold_i(G)^T`` and the
direction is ``G`` times ``(A_i / c2 + eps_i I)^(-1/p)`` along every ``i``. Of a long dimension only matrices along the
diagonal of ``A_i`` are kept (``max_factor_dim``). Pure tensors: no process group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_soo.linalg.norms import power_of_two_scale
from lightning_soo.linalg.products import multiply
from lightning_soo.linalg.symmetric import add_gram_
from lightning_soo.placement.blocks import ArrayLayout, Block
from lightning_soo.preconditioners.signal import GradientSignal
from lightning_soo.refresh.jobs import Job, JobResult

if TYPE_CHECKING:
    from lightning_soo.optim.options import ShampooOptions

# Outside this range squares of float32 gradients start to overflow or to vanish, and statistics are kept scaled.
_SMALLEST, _LARGEST = 1e-10, 1e12


@dataclass
class KroneckerStatistics:
    """Running second moments of one block; exists on the rank that keeps it alone.

    Attributes:
        matrices: one ``(n, n)`` for each of :attr:`Block.diagonals`, of ``scale * G``.
        scale: a power of two, 1 unless gradients are extreme (1e+20, 1e-20), so ``A_i = matrices[i] / scale^2``.
        peak: decayed largest magnitude seen, which decides the scale.
    """

    matrices: list[Tensor]
    scale: float = 1.0
    peak: float = 0.0

    @classmethod
    def zeros(cls, layouts: Sequence[ArrayLayout], *, dtype: torch.dtype, device: torch.device) -> KroneckerStatistics:
        return cls([torch.zeros(layout.shape, dtype=dtype, device=device) for layout in layouts])

    def observe(self, block: Block, gradient: Tensor, *, decay: float, weight: float, magnitude: float) -> None:
        """Add one gradient: ``A_i <- decay A_i + weight unfold_i(G) unfold_i(G)^T``.

        Args:
            gradient: of the block's shape.
            magnitude: largest absolute element of the whole parameter's gradient.
        """
        self.peak = max(self.peak * math.sqrt(decay), magnitude)
        if not _SMALLEST <= self.peak * self.scale <= _LARGEST:
            scale = power_of_two_scale(self.peak)
            for matrix in self.matrices:  # two exact steps: the square of the ratio may not fit the dtype
                matrix.mul_(scale / self.scale).mul_(scale / self.scale)
            self.scale = scale
        gradient = gradient.to(self.matrices[0].dtype)
        if self.scale != 1.0:
            gradient = gradient * self.scale
        matrices = iter(self.matrices)
        for dim, ranges in zip(block.dims, block.diagonals, strict=True):
            unfolded = gradient.movedim(dim, 0).reshape(gradient.shape[dim], -1)
            for start, stop in ranges:
                add_gram_(next(matrices), unfolded[start:stop], beta=decay, alpha=weight)

    def root_job(
        self, *, correction: float, exponent: float, eps: float, relative_eps: bool, counts: Sequence[int]
    ) -> Job:
        """What a worker needs to compute this block's roots, but for its arrays: :attr:`matrices`, brought to the host.

        Args:
            correction: ``c2``, by which the statistics are divided.
            counts: how many of the matrices each dimension has.
        """
        return Job(
            function="lightning_soo.linalg.inverse_roots:inverse_roots",
            separate="lightning_soo.linalg.inverse_roots:separate_roots",
            arrays=(),
            options={
                "divisor": correction * self.scale**2,
                "exponent": exponent,
                "eps": eps,
                "relative_eps": relative_eps,
                "counts": list(counts),
            },
            result_bytes=sum(8 * matrix.numel() for matrix in self.matrices),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"matrices": list(self.matrices), "scale": self.scale, "peak": self.peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip(self.matrices, state["matrices"], strict=True):
            own.copy_(saved)
        self.scale, self.peak = float(state["scale"]), float(state["peak"])


@dataclass
class KroneckerBlock:
    """Everything known about one block on this rank.

    Attributes:
        exponent: ``p``; None: :attr:`root_exponent` finds it from ``signal``.
        has_diagonal_rows: whether rows, which have no matrix, are scaled by others of their second moments.
        signal: of the whole parameter; known on every rank.
        compute_dtype: dtype of the roots, in which the products of :meth:`precondition` run.
        statistics_dtype: dtype of the statistics, wherever they are kept.
        statistics: on the rank that keeps them, else None.
        weight: sum of the weights of all gradients seen, ``1 - b2^t``, by which the statistics are corrected; 1 for a
            plain sum. Known on every rank.
        observations: how many gradients were seen; known on every rank.
        refreshed_observations: how many the last refresh had seen.
        ready: whether roots are in use, wherever the block lives; known on every rank.
        has_exponent: whether roots are taken, with :attr:`root_exponent`.
        stackable: whether :meth:`precondition` also takes a stack of equal blocks, with stacks of their roots.
        needs_gradient: whether :meth:`precondition` wants the gradient beside its running mean.
        roots: as :meth:`root_layouts` says where the block is applied, None before the first are in.
    """

    has_exponent: ClassVar[bool] = True
    stackable: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = False
    block: Block
    exponent: float | None
    compute_dtype: torch.dtype
    has_diagonal_rows: bool = False
    statistics_dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    statistics: KroneckerStatistics | None = None
    signal: GradientSignal = field(default_factory=GradientSignal)
    weight: float = 0.0
    observations: int = 0
    refreshed_observations: int = 0
    ready: bool = False
    roots: list[Tensor] | None = None
    failures: int = 0
    diagnostics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def statistics_layouts(cls, block: Block) -> tuple[ArrayLayout, ...]:
        """Arrays of a block's statistics: one ``(n, n)`` for each of :attr:`Block.diagonals`."""
        return tuple(ArrayLayout((order, order), symmetric=True) for order in block.orders)

    @classmethod
    def root_layouts(cls, block: Block) -> tuple[ArrayLayout, ...]:
        """Arrays that a refresh gives: one ``(n, n)`` for each of :attr:`Block.diagonals`."""
        return cls.statistics_layouts(block)

    def restart(self) -> None:
        """As if no gradient had been seen."""
        self.weight, self.observations, self.refreshed_observations, self.failures = 0.0, 0, 0, 0
        self.ready, self.roots, self.diagnostics = type(self).ready, None, {}
        self.signal = GradientSignal()
        if self.statistics is not None:
            self.statistics.scale, self.statistics.peak = 1.0, 0.0
            for matrix in self.statistics.matrices:
                matrix.zero_()

    @property
    def state_bytes(self) -> int:
        """What this rank holds of the block."""
        held = [*(self.roots or ()), *(self.statistics.matrices if self.statistics is not None else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    @property
    def is_blank(self) -> bool:
        """Whether its roots are zero, since no gradient had come when they were taken; known on every rank.

        The refresh that follows its first gradient ends that; until then the graft moves it alone.
        """
        return self.has_exponent and self.ready and self.diagnostics.get("condition_number") == 0.0

    @property
    def watches_signal(self) -> bool:
        """Whether :attr:`signal` counts."""
        return self.has_exponent and self.exponent is None

    @property
    def root_exponent(self) -> float:
        """``p`` of the next roots: ``exponent``, or by the share ``s`` of signal ``2 + (k - 1) (1 + 3 s) / 2``.

        With gradients that agree statistics are those of one matrix, ``G G^T`` and ``G^T G``, and ``2 k`` gives all its
        singular values the same size; less would turn their order around. With independent ones statistics are a
        covariance, whose best Kronecker approximation has 2 (Morwani et al. 2024, arXiv 2406.17748); a quarter of the
        way from there was better, and safer, than 2 itself (benchmarks/NOTES.md).
        """
        if self.exponent is not None:
            return self.exponent
        dimensions = len(self.block.dims) + self.has_diagonal_rows
        return 2.0 + (dimensions - 1.0) * (1.0 + 3.0 * self.signal.share) / 2.0

    def count(self, *, decay: float, weight: float) -> None:
        """Keep the sum of weights, on every rank, whoever holds the statistics."""
        self.weight = self.weight * decay + weight if decay < 1.0 else 1.0
        self.observations += 1

    def observe(self, gradient: Tensor, *, decay: float, weight: float, magnitude: float) -> None:
        """Add a gradient to the statistics that are kept here."""
        assert self.statistics is not None
        self.statistics.observe(self.block, gradient, decay=decay, weight=weight, magnitude=magnitude)

    def job(self, statistics: KroneckerStatistics, options: ShampooOptions) -> Job:
        """What a worker computes of ``statistics``, but for its arrays: they are brought to the host first."""
        return statistics.root_job(
            correction=self.weight if options.use_bias_correction else 1.0,
            exponent=self.root_exponent,
            eps=options.preconditioner_eps,
            relative_eps=options.relative_eps,
            counts=[len(ranges) for ranges in self.block.diagonals],
        )

    def refresh_in_place(self, statistics: KroneckerStatistics, options: ShampooOptions) -> JobResult | None:
        """What a refresh gives where no worker is needed for it, else None."""
        return None

    def working_state(self) -> tuple[Sequence[Tensor], float] | None:
        """What :meth:`precondition` reads and writes: tensors, and a number; None while there is no root."""
        return None if self.roots is None else (self.roots, 0.0)

    def set_working_state(self, tensors: Sequence[Tensor], number: float) -> None:
        """As :meth:`working_state` gives it; of a stack, tensors have one dimension more."""
        self.roots = list(tensors)

    def precondition(
        self, filtered: Tensor, gradient: Tensor | None = None, group: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return ``filtered`` times the roots, in ``compute_dtype`` and its shape.

        Args:
            filtered: the gradient's running mean, or the gradient itself, of the block's shape.
            gradient, group: of blocks that need them (``needs_gradient``): the gradient and its parameter group.
        """
        assert self.roots is not None
        block = self.block
        return multiply(filtered.to(self.compute_dtype), block.dims, self.roots, ranges=block.diagonals, symmetric=True)
