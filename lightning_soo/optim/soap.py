"""SOAP (Vyas et al. 2024, arXiv 2409.11321) as a torch optimizer: Adam in the eigenbasis of Shampoo's statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soo.naming import suggest_names
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.options import ShampooOptions, adam_group
from lightning_soo.optim.shampoo import Params
from lightning_soo.preconditioners.eigenbasis import EigenbasisBlock
from lightning_soo.refresh.schedule import GROWING, Interval, first_refresh
from lightning_soo.refresh.workers import WorkerOptions


class SOAP(SecondOrderOptimizer):
    """Adam in a slowly changing basis: for each block ``G`` the eigenvectors ``Q_i`` of Shampoo's statistics ``A_i``.

    ``E <- b2 E + (1 - b2) (Q^T G Q)^2`` and the direction is ``Q [(Q^T M Q) / (sqrt(E / c2) + eps)] Q^T``, ``M`` the
    running mean of gradients. ``M`` is kept unrotated, so a new basis changes nothing in it; ``E`` is kept as it is, as
    in the authors' code. Until the first basis is in, and for parameters that are not preconditioned, this is AdamW;
    learning rates of AdamW transfer. Eigenspaces of equal eigenvalues, which are not unique (a statistic that has seen
    fewer gradients than its order), are turned to a position that depends on the space alone, so that runs at different
    world sizes agree. Bases are computed beside training, on the same fixed schedule as :class:`Shampoo`'s roots.

    Args:
        params: parameters, ``named_parameters()``, parameter groups, or a model (then embeddings are recognised).
        lr: learning rate; may be a tensor.
        betas: decay of the running mean, and of both the second moment and the statistics.
        eps: added to the root of the second moment.
        weight_decay: decoupled as in AdamW, or (``decoupled_weight_decay=False``) added to the gradient first.
        precondition_frequency, refresh_delay, stagger, gather_frequency, statistics_frequency,
            start_preconditioning_step: when bases are computed and used, see :class:`Shampoo`; the same defaults.
        max_preconditioner_dim, max_factor_dim, merge_dims, precondition_1d, one_sided_above, overrides: how parameters
            are cut into blocks, see :class:`Shampoo`. A tall parameter is rotated along its short side alone.
        basis: ``"eigh"`` is a whole decomposition, by the workers; ``"qr"`` (from the second basis on) one power
            iteration from the current basis and a QR decomposition, on the parameters' device in the step itself: for
            GPUs, with ``precondition_frequency=10`` or so, since one iteration goes no further. On a CPU it costs as
            much as a whole decomposition (measured). Its ridge, 1e-5 of the largest eigenvalue (1e-3 in float32), keeps
            the basis where statistics have no rank.
        nonfinite, exchange_bucket_bytes, collective_timeout, workers: see :class:`Shampoo`.
        compute_dtype: of the bases and the rotations, see :class:`Shampoo`; the second moment stays in float32.

    Raises:
        ValueError: an option out of range (named with its value), or nothing to precondition.
        TypeError: an unknown option, with the nearest name.
    """

    method = "soap"
    block_class = EigenbasisBlock

    @suggest_names
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        precondition_frequency: int | Interval | Mapping[str, Any] = GROWING,
        refresh_delay: int | None = None,
        stagger: bool = True,
        gather_frequency: int | None = None,
        statistics_frequency: int | None = None,
        start_preconditioning_step: int | None = None,
        max_preconditioner_dim: int = 1024,
        max_factor_dim: int | None = 256,
        merge_dims: str = "kernel",
        precondition_1d: bool = False,
        one_sided_above: int | None = None,
        nonfinite: str = "skip",
        exchange_bucket_bytes: int = 2**25,
        collective_timeout: float | None = None,
        compute_dtype: torch.dtype | str | None = "auto",
        basis: str = "eigh",
        overrides: Sequence[Mapping[str, Any]] | None = None,
        workers: str | WorkerOptions | Mapping[str, Any] = "auto",
    ) -> None:
        interval = Interval.parse(precondition_frequency)
        options = ShampooOptions.parse(
            precondition_frequency=interval,
            # a QR step is taken where the current basis is, so there is nothing to wait for
            refresh_delay=0 if basis == "qr" and refresh_delay is None else refresh_delay,
            basis=basis,
            stagger=stagger,
            gather_frequency=gather_frequency,
            statistics_frequency=statistics_frequency,
            start_preconditioning_step=first_refresh(interval, start_preconditioning_step),
            max_preconditioner_dim=max_preconditioner_dim,
            max_factor_dim=max_factor_dim,
            merge_dims=merge_dims,
            precondition_1d=precondition_1d,
            one_sided_above=one_sided_above,
            grafting=None,
            own_step_size=True,
            nonfinite=nonfinite,
            exchange_bucket_bytes=exchange_bucket_bytes,
            collective_timeout=collective_timeout,
            compute_dtype=compute_dtype,
            overrides=overrides,
            workers=workers,
        )
        super().__init__(params, adam_group(lr, betas, eps, weight_decay, decoupled_weight_decay), options)
