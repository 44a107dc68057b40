"""SONew (Devvrit et al. 2023, arXiv 2311.10085) as a torch optimizer: a sparsified online Newton method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soo.dtypes import parse_dtype
from lightning_soo.naming import suggest_names
from lightning_soo.optim.banded import BandedOptimizer
from lightning_soo.optim.options import SONewOptions, adam_group
from lightning_soo.optim.shampoo import Params


class SONew(BandedOptimizer):
    """Second moments between neighbours, and the sparse inverse that fits them best, at about first-order cost.

    Of each chain of elements the running mean ``S`` of ``g g^T`` is kept on a band of width ``bandwidth``; the
    preconditioner is the positive definite ``X`` with the sparsity of the band that minimises
    ``-logdet X + <X, S + eps I>``, in closed form as ``X = L D L^T``, and the direction is ``X`` times the running mean
    of gradients, with the step size of Adam (whose second moment is the diagonal of ``S``: no state of its own). State:
    ``2 + bandwidth`` elements for each element of a parameter.

    Args:
        params: parameters, ``named_parameters()``, parameter groups, or a model.
        lr: learning rate; may be a tensor. Learning rates of AdamW transfer.
        betas: decay of the running mean of gradients and of the statistics.
        eps: of the Adam graft, outside the root.
        weight_decay: decoupled as in AdamW, or (``decoupled_weight_decay=False``) added to the gradient first.
        bandwidth: neighbours on each side: 0 is diagonal, 1 tridiagonal.
        chain: ``"row"`` is one chain for each row of the matrix view, along the fan-in, where neighbours are most
            alike; ``"flat"`` is one for the whole parameter, as in the authors' code.
        gamma: an edge is removed where what remains of the variance is at most this share of it, and the smaller
            problem is solved. None is 1e-5, or 1e-3 for more than one neighbour.
        preconditioner_eps: ridge, times the largest diagonal element of the chain before this step
            (``relative_eps``) or absolute.
        use_bias_correction: divide statistics by ``1 - b2^t`` and the running mean by ``1 - b1^t``.
        start_preconditioning_step: until then Adam moves alone: at the first steps every edge is degenerate.
        statistics_dtype: None is float32, or float64 for float64 parameters; ``torch.bfloat16`` rounds
            stochastically.
        fused: take the step in one call of compiled code for all parameters: on a CPU, up to four neighbours, built
            at the first step (seconds; needs a C++ compiler); on a GPU in a few launches, up to one neighbour and
            float32 statistics (needs triton). None is where that is possible, False never.
        compiled: let ``torch.compile`` fuse the tridiagonal step instead (a minute at the first step).
        nonfinite: a gradient that is not finite ``"skip"``s the whole step, on all ranks, or ``"raise"``s.
        collective_timeout: of waits for other ranks, see :class:`Shampoo`.
        overrides: exceptions by name pattern or module class: ``[{"match": "embed", "method": "none"}]``.

    Raises:
        ValueError: an option out of range (named with its value), or nothing to precondition.
        TypeError: an unknown option, with the nearest name.
    """

    method = "sonew"

    @suggest_names
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        bandwidth: int = 1,
        chain: str = "row",
        gamma: float | None = None,
        preconditioner_eps: float = 1e-6,
        relative_eps: bool = True,
        use_bias_correction: bool = True,
        start_preconditioning_step: int = 10,
        statistics_dtype: torch.dtype | str | None = None,
        fused: bool | None = None,
        compiled: bool = False,
        nonfinite: str = "skip",
        collective_timeout: float | None = None,
        overrides: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        options = SONewOptions.parse(
            bandwidth=bandwidth,
            chain=chain,
            gamma=gamma,
            fused=fused,
            compiled=compiled,
            preconditioner_eps=preconditioner_eps,
            relative_eps=relative_eps,
            use_bias_correction=use_bias_correction,
            start_preconditioning_step=start_preconditioning_step,
            band_dtype=parse_dtype("statistics_dtype", statistics_dtype),
            nonfinite=nonfinite,
            collective_timeout=collective_timeout,
            overrides=overrides,
            grafting=None,
            own_step_size=True,
            precondition_frequency=1,
            compute_dtype=None,
            workers="inline",
        )
        super().__init__(params, adam_group(lr, betas, eps, weight_decay, decoupled_weight_decay), options)
