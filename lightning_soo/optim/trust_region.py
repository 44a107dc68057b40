"""Trust-region Newton-CG: the loss's own curvature by products, and steps as long as the model has been right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lightning_soo.checkpoint.errors import CheckpointError
from lightning_soo.naming import suggest_names
from lightning_soo.optim.objective import Closure, mean_loss
from lightning_soo.optim.radius_rules import RadiusRule
from lightning_soo.optim.repetition import RandomState
from lightning_soo.optim.shampoo import Params
from lightning_soo.optim.sub_batches import batch_size, closures, one_of_each_stratum, take
from lightning_soo.optim.trust_region_iteration import TrustRegionIterations
from lightning_soo.optim.trust_region_options import Preconditioner, TrustRegionOptions

_COUNTERS = ("steps", "accepted", "cg_iterations", "negative_curvature", "propagations")


class TrustRegionNewtonCG(TrustRegionIterations):
    """Newton's method with a trust region, solved by conjugate gradients (Steihaug 1983; Nocedal and Wright 2006, ch. 4
    and 7; for deep networks Xu, Roosta and Mahoney 2020).

    Each step minimises the quadratic model of the loss within a radius, by products of the curvature with vectors, and
    then looks whether the loss fell as the model said: that decides whether the step is accepted and how large the next
    region is. There is no learning rate.

    .. code-block:: python

        optimizer = TrustRegionNewtonCG(model, radius=1.0)
        for inputs, targets in loader:
            optimizer.step_on(lambda batch: loss_function(model(batch[0]), batch[1]), (inputs, targets))

    or ``optimizer.step(closure)`` with a closure that returns the loss **with its graph** (no ``backward``), or a list
    of closures, one for each micro-batch. ``hessian_fraction=1`` on large or full batches is TRCG, below 1 STRCG.

    A step evaluates its closures several times: with the same random numbers (dropout), and with buffers (BatchNorm's
    running statistics) that count the batch once. In training mode BatchNorm's loss depends on the batch, and the
    curvature of a part of the batch is that of its own statistics. The closure runs without gradients when the trial
    point is evaluated; a loss that differentiates inside itself does so under ``torch.enable_grad()``.

    Args:
        params: a model; or parameters, groups or ``named_parameters()``, with ``attach(model)`` where the model has
            buffers or is sharded.
        radius: of the first region: the Euclidean norm of the step over all parameters.
        max_radius: of any region; None is the preset's.
        preset: ``"xu"`` (accept above 1e-4; halve, grow 1.2 or 2 times), ``"scipy"`` (that of scipy's ``trust-ncg``:
            accept above 0.15; quarter, keep or double), or a :class:`RadiusRule`.
        curvature: ``"hessian"``, or ``"gauss_newton"``, which is never negative: closures then return
            ``(loss, outputs)``.
        hessian_fraction: of the examples (``step_on``) or micro-batches (closures) whose curvature is taken: one out of
            every ``1 / hessian_fraction`` consecutive ones, at random. Loss and gradient are always those of all.
        max_cg_iterations: products in one step; None is the preset's (250, or as many as it takes).
        cg_tolerance: of the residual, relative to the gradient's norm; None is ``min(0.5, sqrt(norm))``.
        preconditioner: of the conjugate gradients, and of the region's norm: ``"diagonal"`` (running root mean squares
            of the gradients), or a function that applies the inverse of a positive definite matrix to a list of tensors
            shaped as the trainable parameters (one device or DDP).
        weight_decay: coefficient of half the squared parameters, added to the loss; by parameter group.
        retries: further iterations on the same batch after a rejection, within one ``step``; each takes one forward
            pass. 0: one step is one iteration, and :meth:`retry` is yours to call.
        stored_radii: for how many rejections in a row the conjugate gradients' points are kept; each may take the
            memory of one model while the step lasts.
        keep_graphs: keep the graph of every micro-batch for products, or (False) build it for each product; None keeps
            it where there is one micro-batch.
        nonfinite: a loss, a gradient or a product with the curvature that is not finite: ``"skip"`` the step and warn
            once, or ``"raise"``.
        seed: of the choice of examples for ``hessian_fraction``.
        collective_timeout: of waits for other ranks, see :class:`Shampoo`.

    Attributes:
        last: the last iteration, a :class:`TrustRegionStep`.

    Raises:
        ValueError: an option out of range, named with its value.
        TypeError: an unknown option, with the nearest name.
    """

    skipped_steps = 0
    # set by front doors whose closure collects by itself and returns nothing to differentiate
    closure_collects = False
    # GradScaler would decide per rank to skip, and passes no closure: step() says so
    _step_supports_amp_scaling = True

    @suggest_names
    def __init__(
        self,
        params: Params,
        radius: float = 1.0,
        *,
        max_radius: float | None = None,
        preset: str | RadiusRule = "xu",
        curvature: str = "hessian",
        hessian_fraction: float = 1.0,
        max_cg_iterations: int | None = None,
        cg_tolerance: float | None = None,
        preconditioner: str | Preconditioner | None = None,
        weight_decay: float = 0.0,
        retries: int = 0,
        stored_radii: int = 4,
        keep_graphs: bool | None = None,
        nonfinite: str = "skip",
        seed: int = 0,
        collective_timeout: float | None = None,
    ) -> None:
        options = TrustRegionOptions.parse(
            preset=preset,
            max_radius=max_radius,
            max_cg_iterations=max_cg_iterations,
            curvature=curvature,
            hessian_fraction=hessian_fraction,
            cg_tolerance=cg_tolerance,
            preconditioner=preconditioner,
            retries=retries,
            stored_radii=stored_radii,
            keep_graphs=keep_graphs,
            nonfinite=nonfinite,
            seed=seed,
            collective_timeout=collective_timeout,
        )
        if not 0 < radius <= options.max_radius:
            raise ValueError(f"radius={radius!r}: must be above 0 and at most max_radius={options.max_radius}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay={weight_decay!r}: must be at least 0, and finite")
        # in the groups, which every engine's checkpoints carry
        defaults = {"radius": float(radius), "weight_decay": float(weight_decay), **dict.fromkeys(_COUNTERS, 0)}
        super().__init__(params, defaults, options)

    @property
    def steps(self) -> int:
        """Iterations so far, accepted or not."""
        return int(self.param_groups[0]["steps"])

    @property
    def propagations(self) -> float:
        """Forward and backward passes so far, times the weights of what they went through: with ``step_on``, or weights
        that are numbers of examples, passes through one example. A product with the curvature is two passes, and two
        more where the graph is built for it."""
        return float(self.param_groups[0]["propagations"])

    @property
    def rejected(self) -> bool:
        """Whether the last iteration was rejected, so that :meth:`retry` can go on with its batch."""
        return self._rejected is not None

    def collect(self, closure: Closure, weight: float = 1.0) -> Tensor:
        """Evaluate one micro-batch of the next :meth:`step`.

        Args:
            closure: returns the loss with its graph, or ``(loss, outputs)``; called again during the step.
            weight: of this loss in the mean of all micro-batches of all ranks, such as its number of examples.

        Returns:
            The loss, detached.
        """
        _check_weight(weight)
        self._rejected = None
        objective = self.gather()
        try:
            return objective.add(closure, weight, keep_graph=self.options.hessian_fraction == 1)
        except BaseException:
            self.abandon()
            raise

    def collect_evaluated(
        self,
        result: Any,
        state: RandomState,
        closure: Closure,
        weight: float = 1.0,
        divided: Callable[[Sequence[int]], Closure] | None = None,
    ) -> Tensor:
        """As :meth:`collect`, for a front door that has evaluated the micro-batch since :meth:`gather`.

        Args:
            result: what the closure would return.
            state: random numbers before that evaluation.
            divided: for ``hessian_fraction`` of every micro-batch's examples: from the positions of some of them to a
                closure of their loss. ``weight`` is then their number.
        """
        _check_weight(weight)
        self._rejected = None
        keep = self.options.hessian_fraction == 1
        try:
            return self.gather().add_evaluated(result, state, closure, weight, keep_graph=keep, divided=divided)
        except BaseException:
            self.abandon()
            raise

    @_disable_dynamo
    def step_on(self, loss_of: Callable[[Any], Any], batch: Any, micro_batches: int = 1) -> Tensor | None:
        """One step on one batch, which is divided as it takes: into micro-batches, and for ``hessian_fraction``.

        Args:
            loss_of: from a batch, or a part of one, to its mean loss, or to ``(loss, outputs)``.
            batch: tensors whose first dimension is the examples', in any structure of lists, tuples and mappings.
            micro_batches: into how many parts the batch is divided, where its graph does not fit in memory.

        Raises:
            ValueError: a batch that cannot be divided.
        """
        size = batch_size(batch)
        sample = None
        if self.options.hessian_fraction < 1:
            chosen = self._choose(size)
            sample = closures(loss_of, take(batch, chosen), -(-len(chosen) * micro_batches // size))
        if not self._trains:
            return mean_loss(*zip(*closures(loss_of, batch, micro_batches), strict=True))
        for closure, weight in closures(loss_of, batch, micro_batches):
            self.collect(closure, weight)
        return self._step(sample)

    @_disable_dynamo  # torch.compile(optimizer.step) runs it as it is
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        weights: Sequence[float] | None = None,
        hessian_closure: Closure | Sequence[Closure] | None = None,
    ) -> Tensor | None:
        """One trust-region iteration, accepted or not (and ``retries`` more after a rejection). Collective.

        Args:
            closure: returns the loss with its graph, or ``(loss, outputs)``; or several, one for each micro-batch.
                None where :meth:`collect` was called.
            weights: of each micro-batch in the mean, such as numbers of examples; equal where not given.
            hessian_closure: losses whose curvature is taken in place of the closures', equally weighted.

        Returns:
            The mean loss of all ranks before the step.

        Raises:
            TypeError: no closure, or one that returns something else; a GradScaler.
            FloatingPointError: a loss or gradient that is not finite, with ``nonfinite="raise"``.
            RuntimeError: an operation of the model without a second derivative.
        """
        if self.closure_collects:
            if closure is None:  # no step: see below
                self._nothing_collected()
                return None
            assert callable(closure)
            closure()
            closure = None
        listed = _listed(closure)
        if weights is not None and len(weights) != len(listed):
            raise ValueError(f"{len(weights)} weights for {len(listed)} closures")
        if listed and not self._trains:
            return mean_loss(listed, weights or [1.0] * len(listed))
        for one, weight in zip(listed, weights or [1.0] * len(listed), strict=True):
            self.collect(one, weight)
        if self._objective is None:
            self._nothing_collected()
            return None
        self.gather()
        loss = self._step([(one, 1.0) for one in _listed(hessian_closure)] or None)
        if self.closure_collects:
            self._rejected = None  # nobody retries: its vectors are freed before the next forward pass
        return loss

    @_disable_dynamo
    def retry(self) -> Tensor | None:
        """One more iteration on the batch of a step that was rejected, in the smaller region: with its gradient and the
        conjugate gradients' points, so it takes one forward pass. Collective.

        Raises:
            RuntimeError: the last iteration was not rejected.
        """
        rejected = self._rejected
        if rejected is None:
            raise RuntimeError("the last step was not rejected: retry() goes on after a rejection (optimizer.rejected)")
        self._gather_again(rejected.objective)
        return self._iterate(rejected, 0)

    @property
    def _trains(self) -> bool:
        """Whether anything can move: where all is frozen a step does nothing, as torch's."""
        return any(parameter.requires_grad for group in self.param_groups for parameter in group["params"])

    def _nothing_collected(self) -> None:
        if hasattr(self, "grad_scale"):
            raise TypeError(
                "a GradScaler cannot step TrustRegionNewtonCG: it passes no closure. Use bfloat16 (autocast needs no "
                "scaler) or float32, and call optimizer.step(closure)"
            )
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(bool(gradient.any()) for gradient in gradients):
            raise TypeError(
                "step() needs a closure that returns the loss with its graph (no backward), or optimizer.collect(...) "
                "before it"
            )
        # loaders of sharded checkpoints step with zero gradients to see which state there is
        if self._space is None and self._trains:
            self.attach()

    def _step(self, sample: Sequence[tuple[Closure, float]] | None) -> Tensor | None:
        objective = self._objective
        assert objective is not None
        try:
            if sample is not None:
                objective.take_products_over(sample)
            elif self.options.hessian_fraction < 1 and objective.divisible:
                objective.take_products_over_examples(self._choose)
            elif self.options.hessian_fraction < 1:
                objective.choose(self._choose(len(objective.evaluations)))
            iteration = self._begin()
            loss, norm = iteration.loss, iteration.norm
            if not (math.isfinite(loss) and math.isfinite(norm)):
                return self._skip(loss, f"the loss ({loss:g}) or its gradient ({norm:g}) is not finite")
            self._observe(iteration.gradient)
            try:
                return self._iterate(iteration, self.options.retries)
            except FloatingPointError as error:
                return self._skip(loss, str(error))
        except BaseException:
            self.abandon()
            raise

    def _choose(self, count: int) -> list[int]:
        fraction, rank = self.options.hessian_fraction, self._transport.rank
        if count == 1 and fraction < 1:
            raise ValueError(
                f"hessian_fraction={fraction} of one closure: use step_on(loss_of, batch), give several closures, or a "
                "hessian_closure"
            )
        return one_of_each_stratum(count, fraction, seed=self.options.seed, step=self.steps, rank=rank)

    def _skip(self, loss: float, reason: str) -> Tensor:
        reason = f"{reason} (after {self.steps} iterations)"
        if self.options.nonfinite == "raise":
            raise FloatingPointError(f"{reason}; nothing was changed")
        self.skipped_steps += 1
        if self.skipped_steps == 1:
            warnings.warn(f"{reason}: step skipped, nothing changed (said once)", stacklevel=6)
        self.abandon()
        self._share_buffers()
        return torch.tensor(loss)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's: radius and counters are in the groups.

        Raises:
            CheckpointError: the state of another optimizer.
        """
        if any("radius" not in group for group in state_dict.get("param_groups", [{}])):
            raise CheckpointError(
                f"this is not a state of {type(self).__name__}: its groups have no radius (the state of another "
                "optimizer?)"
            )
        super().load_state_dict(state_dict)
        self._rejected = None
        if self._layout is not None:
            self._prepare_state()  # FSDP1 saves none for parameters of which a rank holds nothing

    def diagnostics(self) -> dict[str, float]:
        """Figures for a logger, equal on all ranks; empty before the first step."""
        if self.last is None:
            return {}
        return self.last.figures() | {
            "propagations": self.propagations,
            "skipped_steps": float(self.skipped_steps),
        }


def _listed(closure: Closure | Sequence[Closure] | None) -> list[Closure]:
    if closure is None:
        return []
    return [closure] if callable(closure) else list(closure)


def _check_weight(weight: float) -> None:
    if not 0 < weight < math.inf:
        raise ValueError(f"weight={weight!r} of a micro-batch: must be above zero, such as its number of examples")
