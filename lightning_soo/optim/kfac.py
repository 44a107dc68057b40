"""Distributed K-FAC: curvature of whole layers, from what their inputs and output gradients have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soo.dtypes import parse_dtype
from lightning_soo.naming import suggest_names
from lightning_soo.optim.adaptive_damping import AdaptiveDamping
from lightning_soo.optim.kfac_options import KFACOptions
from lightning_soo.optim.layered import LayeredOptimizer
from lightning_soo.optim.options import parameter_group
from lightning_soo.optim.shampoo import Params
from lightning_soo.refresh.schedule import Interval, first_refresh
from lightning_soo.refresh.workers import WorkerOptions

# fewer short intervals than Shampoo's: inverses of wide layers take seconds
INTERVAL: Mapping[str, float] = {"first": 5, "growth": 1.5, "max": 100}


class KFAC(LayeredOptimizer):
    """Natural-gradient descent with a Kronecker-factored Fisher matrix of each layer.

    For a layer with weight (and bias) gradient ``V``, ``(outputs, inputs + 1)``, the direction is
    ``(G (x) A + damping I)^-1 V``: ``A`` is the running second moment of its inputs, ``G`` of the gradients of a single
    example's loss at its outputs (Martens and Grosse 2015; Grosse and Martens 2016 for convolutions; Ba, Grosse and
    Martens 2017 for the division of labour). Factors are those of all examples of all ranks, the same for any loss
    reduction, batch split, accumulation, number of ranks and engine. Inverses are computed beside training, each
    layer's by one rank, and used at fixed steps. What is not covered is moved by SGD (or Adam) and named in the plan
    table.

    It sees layers through hooks, so it needs the model: ``KFAC(model, ...)``, or ``attach(model)`` before the first
    forward pass. Before the first inverses are in, SGD with the same settings moves.

    Args:
        params: a model; or parameters, groups or ``named_parameters()``, with ``attach(model)`` later.
        lr: learning rate; may be a tensor.
        momentum, nesterov: as ``torch.optim.SGD``'s, of the preconditioned step.
        weight_decay: decoupled, or (``decoupled_weight_decay=False``) added to the gradient first.
        damping: ``lambda``, added to the eigenvalues of the Fisher matrix of the loss of one example.
        damping_method: ``"exact"`` adds it to the Kronecker product (four products per layer and step), ``"pi"``
            divides it between the factors (two products, and half the memory).
        kl_clip: the step is shortened where ``sum lr^2 <direction, gradient>`` exceeds it; None for no bound. Not used
            with a graft. ``kl_clip_decay`` multiplies it at every step.
        fisher: ``"empirical"`` uses the gradients of training itself; ``"mc"`` those of labels drawn from the model,
            ``"ggn"`` the exact Gauss-Newton factors of small outputs: each with a backward pass of its own through
            activations, in the steps that update statistics.
        likelihood: of the outputs, for ``"mc"`` and ``"ggn"``: ``"categorical"`` (logits) or ``"gaussian"``.
        outputs: name of the module that returns them (``"network"`` in a LightningModule whose ``training_step`` calls
            ``self.network(x)``); None is the model. Or call :meth:`observe_outputs`. FSDP and ZeRO-3, which free
            weights before the backward pass, are refused by name for these two.
        approximation: layers used at several positions: ``"expand"`` counts each position as an example, ``"reduce"``
            averages inputs and adds gradients over positions first (cheap for convolutions).
        statistics_frequency: steps between two updates of the factors. In the steps between, hooks do nothing.
        precondition_frequency: steps between two inverses of a layer: a number, or an interval that starts short and
            grows; the default is 5, 8, 11, 17 and so on up to 100.
        refresh_delay: steps from the start of an inverse to its use, whatever the workers do; None is an eighth of the
            interval (the first ones are used at once), 0 is at once.
        stagger: spread inverses over the interval.
        start_preconditioning_step: step of the first inverses; the factors of up to eight steps before are seen. Until
            then SGD moves alone, at the same learning rate. None is step 5, or the interval where that is shorter.
        factor_decay: of the running factors, for one step; they are debiased.
        adaptive_damping: True, or a mapping of :class:`AdaptiveDamping`'s fields: every few steps the change of the
            loss on the step's batch is compared with what the quadratic model predicts, and damping is changed. Needs
            ``optimizer.evaluate``, a function that gives this batch's loss; Lightning's front doors set it,
            Accelerate's where the model returns its loss. Not under ZeRO, which updates the model only after the step.
        batch_reduction: ``"mean"`` or ``"sum"``: what the loss does over the examples of a batch.
        max_preconditioner_dim: a larger input factor is kept as the product of two, channels and space (Ba, Grosse
            and Martens 2017), a larger output factor as a diagonal.
        input_shapes: layer name -> ``(channels, space)`` of a fully connected layer's inputs, for that product; a
            convolution's are its channels and taps, others are cut near their square root.
        statistics_ranks: how many ranks collect statistics, from rank 0; None is all.
        statistics_positions: about how many output positions of a convolution are looked at for each example; None is
            all of them.
        gram_dtype: in which products of statistics are formed (``torch.bfloat16``); sums stay in float32.
        grafting: whose step size each direction gets, as in :class:`Shampoo`; None keeps K-FAC's own.
        betas, eps: of a graft; with ``betas[0] > 0`` the running mean of gradients is preconditioned.
        moves_the_rest: ``"sgd"`` or ``"adam"``: what moves uncovered parameters, and all of them before the first
            inverses, where there is no graft.
        nonfinite, exchange_bucket_bytes, collective_timeout, workers, overrides, gather_frequency, compute_dtype: see
            :class:`Shampoo`; an override may exclude layers by name or class (``{"match": "Embedding", "method":
            "none"}``).

    Raises:
        ValueError: an option out of range (named with its value), no model, or nothing to precondition.
        TypeError: an unknown option, with the nearest name.
    """

    method = "kfac"

    @suggest_names
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.05,
        momentum: float = 0.9,
        nesterov: bool = False,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        damping: float = 1e-3,
        damping_method: str = "exact",
        kl_clip: float | None = 1e-3,
        kl_clip_decay: float = 1.0,
        fisher: str = "empirical",
        likelihood: str = "categorical",
        outputs: str | None = None,
        approximation: str = "expand",
        statistics_frequency: int = 10,
        precondition_frequency: int | Interval | Mapping[str, Any] = INTERVAL,
        refresh_delay: int | None = None,
        stagger: bool = True,
        gather_frequency: int | None = None,
        start_preconditioning_step: int | None = None,
        factor_decay: float = 0.95,
        adaptive_damping: bool | Mapping[str, Any] | AdaptiveDamping | None = None,
        batch_reduction: str = "mean",
        max_preconditioner_dim: int = 4096,
        statistics_ranks: int | None = None,
        statistics_positions: int | None = None,
        gram_dtype: torch.dtype | str | None = None,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        grafting: str | None = None,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        moves_the_rest: str = "sgd",
        nonfinite: str = "skip",
        exchange_bucket_bytes: int = 2**25,
        collective_timeout: float | None = None,
        compute_dtype: torch.dtype | str | None = None,
        overrides: Sequence[Mapping[str, Any]] | None = None,
        workers: str | WorkerOptions | Mapping[str, Any] = "auto",
    ) -> None:
        interval = Interval.parse(precondition_frequency)
        options = KFACOptions.parse(
            damping=damping,
            damping_method=damping_method,
            kl_clip=kl_clip,
            kl_clip_decay=kl_clip_decay,
            adaptive_damping=AdaptiveDamping.parse(adaptive_damping),
            fisher=fisher,
            likelihood=likelihood,
            outputs=outputs,
            approximation=approximation,
            statistics_frequency=statistics_frequency,
            precondition_frequency=interval,
            refresh_delay=refresh_delay,
            stagger=stagger,
            gather_frequency=gather_frequency,
            start_preconditioning_step=first_refresh(interval, start_preconditioning_step),
            factor_decay=factor_decay,
            batch_reduction=batch_reduction,
            max_preconditioner_dim=max_preconditioner_dim,
            statistics_ranks=statistics_ranks,
            statistics_positions=statistics_positions,
            gram_dtype=parse_dtype("gram_dtype", gram_dtype),
            input_shapes=tuple((name, (int(a), int(b))) for name, (a, b) in (input_shapes or {}).items()),
            grafting=grafting,
            moves_the_rest=moves_the_rest,
            nonfinite=nonfinite,
            exchange_bucket_bytes=exchange_bucket_bytes,
            collective_timeout=collective_timeout,
            compute_dtype=compute_dtype,
            overrides=overrides,
            workers=workers,
        )
        defaults = parameter_group(lr, betas, eps, weight_decay, decoupled_weight_decay, momentum, dampening, nesterov)
        super().__init__(params, defaults, options)
