"""Scalable Shampoo (Anil et al. 2020, arXiv 2002.09018; Gupta et al. 2018) as a torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soo.naming import suggest_names
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.options import ShampooOptions, parameter_group
from lightning_soo.refresh.schedule import GROWING, Interval, first_refresh
from lightning_soo.refresh.workers import WorkerOptions

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Shampoo(SecondOrderOptimizer):
    """Shampoo with grafting, blocking, and roots computed beside training.

    Every parameter's matrix view is cut into blocks ``G``; per preconditioned dimension ``i`` of a block the statistic
    ``A_i <- b2 A_i + (1 - b2) unfold_i(G) unfold_i(G)^T`` is kept, its root ``R_i = (A_i / c2 + eps_i I)^(-1/p)`` is
    refreshed now and then, and the direction is ``G`` (filtered by ``betas[0]``) times ``R_i`` along every ``i``, with
    the step size of ``grafting``.

    Args:
        params: parameters, ``named_parameters()``, parameter groups, or a model (then embeddings are recognised).
        lr: learning rate; may be a tensor.
        betas: decay of the gradient filter (before preconditioning; also Adam's first moment) and of the statistics.
            ``betas[1] = 1`` is the plain sum with weight 1 (Adagrad). Both are per step, whatever
            ``statistics_frequency``.
        eps: of the graft, added outside the root.
        weight_decay: decoupled as in AdamW, or (``decoupled_weight_decay=False``) added to the gradient first.
        momentum: after grafting, with ``dampening`` and ``nesterov`` as in ``torch.optim.SGD``.
        preconditioner_eps: ridge of the statistics, times their largest eigenvalue (``relative_eps``) or absolute. Of
            several matrices along a side, one that is as small as the largest one's ridge has that ridge. Until the
            refresh that follows its first gradient, the graft moves a block alone.
        use_bias_correction: divide statistics by ``c2 = 1 - b2^t`` and the filter by ``1 - b1^t``. The Adam graft is
            always corrected, the RMSprop graft never.
        precondition_frequency: steps between two refreshes of a block's roots: a number, or an interval that starts
            short and grows, since stale roots cost progress early: the default is 2, 2, 3, 3 and so on up to 100,
            after 659 steps.
        refresh_delay: steps between the start of a refresh and the first step that uses it, the same with every
            executor; 0 is synchronous. None is an eighth of the interval (while it grows, of the one around that
            step), except for the very first refresh, which is used at once: until then the graft alone moves.
        stagger: spread the blocks' refreshes over the interval.
        gather_frequency: roots change hands only at multiples of this; None: as soon as the delay is over.
        statistics_frequency: steps between two updates of the statistics; None is a tenth of ``precondition_frequency``
            (while it grows, of the interval around the step), at most 10. The last eight steps before the first refresh
            are all observed, so that the first roots have seen a handful of gradients.
        start_preconditioning_step: step of the first refresh of all blocks; None is 5, or the (longest) interval where
            that is shorter. Until the first roots are in, the graft alone moves, and what a large learning rate does
            then is not made good later.
        max_preconditioner_dim: largest side of a block; longer sides are cut evenly.
        max_factor_dim: largest matrix of a block's preconditioners. A longer side has several, along the diagonal of
            ``A_i``, and each sees all of the block's other side; so they cost less than those of smaller blocks, and
            are less noisy. None: as large as the side.
        merge_dims: ``"none"``; ``"kernel"`` (a convolution becomes ``O x I*kh*kw``; a stack of matrices, as experts
            have, stays as it is); ``"all"`` (dimensions of size one dropped, merged from the right while the product is
            at most ``max_preconditioner_dim``). Dimensions of size one never have a preconditioner.
        precondition_1d: whether vectors (biases, norms) are preconditioned.
        one_sided_above: a longer dimension has no matrix, as that of a vocabulary. None is 16384, or
            ``8 * max_preconditioner_dim`` where that is more. The vocabulary side of ``nn.Embedding`` never has one
            when the model is known.
        diagonal_rows: where the first dimension has no matrix for that, it has a diagonal, one of the ``k``
            dimensions: the mean of the graft's second moments over each row, so that rare words move too. Grafts
            without second moments (None, ``"sgd"``), and False: the papers' one-sided ``G R^(-1/2)``.
        exponent_override: ``p`` of ``A^(-1/p)``; ``"2k"`` is the papers', twice the number ``k`` of preconditioned
            dimensions; None goes from ``2k`` where a parameter's gradients agree, as at a learning rate far below the
            best one, to ``(k + 3) / 2`` (2.5 for a matrix) where they are noise: the same steps end low at both.
        grafting: whose step size is used: None, ``"sgd"``, ``"adagrad"``, ``"rmsprop"``, ``"adam"``,
            ``"adagrad_normalized"``, ``"rmsprop_normalized"`` (of the gradient divided by its norm).
        grafting_beta2: decay of the graft's second moment; None is ``betas[1]``.
        grafting_norm: match norms over the whole ``"parameter"`` (Google) or per ``"block"`` (Meta).
        nonfinite: a gradient that is not finite ``"skip"``s the whole step, on all ranks, or ``"raise"``s.
        exchange_bucket_bytes: size of one buffer in which blocks that sharding has cut travel to the rank that
            preconditions them and back; a block that is larger travels alone.
        collective_timeout: seconds after which a wait for other ranks ends in a ``TransportError`` that names what was
            waited for, and the ranks that have not come; more than three times the workers' ``deadline``. None is the
            process group's own timeout, which is also the longest possible. Under NCCL its watchdog ends the process.
        compute_dtype: of the roots and the products with them. ``"auto"`` is bfloat16 for blocks of about 128 x 128 and
            more where the rates of such products, measured on every rank's device, are 1.5 times those of float32 (four
            times on current server CPUs, more on GPUs), unless parameters are float64. None is float32, or float64
            for float64 parameters. Statistics are float32 and roots are computed in float64 all the same.
        overrides: exceptions by name pattern or module class, first match wins:
            ``[{"match": "lm_head|embed", "method": "none"}, {"match": "Conv2d", "max_preconditioner_dim": 512}]``.
        workers: ``"auto"``, ``"inline"``, ``"deferred"``, ``"thread"``, ``"process"``, a mapping, or
            :class:`WorkerOptions`.

    Raises:
        ValueError: an option out of range (named with its value), or nothing to precondition.
        TypeError: an unknown option, with the nearest name.
    """

    method = "shampoo"

    @suggest_names
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        preconditioner_eps: float = 1e-6,
        relative_eps: bool = True,
        use_bias_correction: bool = True,
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
        diagonal_rows: bool = True,
        exponent_override: float | str | None = None,
        grafting: str | None = "adam",
        grafting_beta2: float | None = None,
        grafting_norm: str = "parameter",
        nonfinite: str = "skip",
        exchange_bucket_bytes: int = 2**25,
        collective_timeout: float | None = None,
        compute_dtype: torch.dtype | str | None = "auto",
        overrides: Sequence[Mapping[str, Any]] | None = None,
        workers: str | WorkerOptions | Mapping[str, Any] = "auto",
    ) -> None:
        interval = Interval.parse(precondition_frequency)
        options = ShampooOptions.parse(
            preconditioner_eps=preconditioner_eps,
            relative_eps=relative_eps,
            use_bias_correction=use_bias_correction,
            precondition_frequency=interval,
            refresh_delay=refresh_delay,
            stagger=stagger,
            gather_frequency=gather_frequency,
            statistics_frequency=statistics_frequency,
            start_preconditioning_step=first_refresh(interval, start_preconditioning_step),
            max_preconditioner_dim=max_preconditioner_dim,
            max_factor_dim=max_factor_dim,
            merge_dims=merge_dims,
            precondition_1d=precondition_1d,
            one_sided_above=one_sided_above,
            diagonal_rows=diagonal_rows,
            exponent_override=exponent_override,
            grafting=grafting,
            grafting_beta2=grafting_beta2,
            grafting_norm=grafting_norm,
            nonfinite=nonfinite,
            exchange_bucket_bytes=exchange_bucket_bytes,
            collective_timeout=collective_timeout,
            compute_dtype=compute_dtype,
            overrides=overrides,
            workers=workers,
        )
        defaults = parameter_group(lr, betas, eps, weight_decay, decoupled_weight_decay, momentum, dampening, nesterov)
        super().__init__(params, defaults, options)
