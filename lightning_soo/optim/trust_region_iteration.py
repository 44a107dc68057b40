"""Trust-region iterations on one batch: from a loss and its gradient to parameters that are accepted or not."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_soo.linalg.norms import power_of_two_scale
from lightning_soo.linalg.trust_region import Product, Solution, steihaug
from lightning_soo.optim.gathered import GatheredOptimizer
from lightning_soo.optim.objective import Objective
from lightning_soo.optim.trust_region_options import TrustRegionStep

_SECOND_MOMENT = "exp_avg_sq"
_DECAY = 0.95  # of the second moments behind the diagonal preconditioner
_UNBOUNDED = 20  # products for each parameter: rounding makes them more than one
_RIDGE = 1e-3  # of their mean root
_SMALLEST, _LARGEST = 1e-10, 1e10  # norms of gradients between which nothing overflows or vanishes in float32


@dataclass
class Iteration:
    """What one batch has given so far, for this iteration and for those after a rejection.

    Attributes:
        before: local vector of the parameters at which loss and gradient were taken.
        gradient: local vector; ``norm`` is that of all of it.
        solutions: of the model, for the radius it was solved for and for smaller ones.
        tried: the last of them whose loss was computed.
        counted: propagations of the objective that are in the optimizer's count.
    """

    objective: Objective
    before: Tensor
    loss: float
    gradient: Tensor
    norm: float
    solutions: list[Solution] = field(default_factory=list)
    tried: Solution | None = None
    trial_loss: float = math.nan
    counted: float = 0.0


class TrustRegionIterations(GatheredOptimizer):
    """The part of :class:`lightning_soo.TrustRegionNewtonCG` that knows no closures."""

    last: TrustRegionStep | None = None
    _rejected: Iteration | None = None

    @property
    def radius(self) -> float:
        """Of the next region."""
        return float(self.param_groups[0]["radius"])

    def _begin(self) -> Iteration:
        """Loss and gradient of what was collected. Collective."""
        objective, space = self._objective, self._space
        assert objective is not None and space is not None
        self._transport.begin_step(int(self.param_groups[0]["steps"]) + 1)
        loss, gradient = objective.mean()
        decay = self._decay()
        if decay is not None:
            gradient.addcmul_(decay, self._before)
        norm = math.sqrt(float(space.gram([gradient])[0, 0]))
        return Iteration(objective, self._before, loss + self._decay_loss(self._before), gradient, norm)

    def _iterate(self, iteration: Iteration, retries: int) -> Tensor:
        """Trial points on one batch until one is accepted or ``retries`` are used up."""
        try:
            for left in range(retries, -1, -1):
                self._try(iteration)
                assert self.last is not None
                if self.last.accepted or left == 0:
                    break
            assert self.last is not None
            accepted = self.last.accepted
            after = iteration.before
            if accepted and iteration.tried is not None:
                after = after + iteration.tried.step
            loss = torch.tensor(iteration.loss, dtype=iteration.gradient.dtype, device=iteration.gradient.device)
            self._release(after)
            self._rejected = None if accepted else iteration
            return loss
        except BaseException:
            self.abandon()
            raise

    def _try(self, iteration: Iteration) -> None:
        """One iteration: a solution of the model in the region, its loss, and the next radius."""
        options, radius = self.options, self.radius
        solution, used = self._solution(iteration, radius)
        if solution is not iteration.tried:
            iteration.tried = solution
            point = iteration.before + solution.step
            iteration.trial_loss = iteration.objective.value(point) + self._decay_loss(point)
        predicted, actual = -solution.model, iteration.loss - iteration.trial_loss
        # where both reductions are below what the loss resolves, their ratio means nothing (Conn, Gould and Toint 2000,
        # section 17.4.2)
        unseen = 10 * iteration.objective.resolution * abs(iteration.loss)
        ratio = (actual + unseen) / (predicted + unseen) if predicted + unseen > 0 else math.nan
        if not math.isfinite(iteration.trial_loss):
            ratio = -math.inf
        accepted = options.rule.accepts(ratio)
        following = options.rule.next_radius(
            radius,
            ratio,
            step_norm=solution.norm,
            on_boundary=solution.on_boundary,
            max_radius=options.max_radius,
        )
        if iteration.norm == 0:  # nowhere to go
            accepted, following = False, radius
        propagations = iteration.objective.propagations - iteration.counted
        iteration.counted = iteration.objective.propagations
        self.last = TrustRegionStep(
            loss=iteration.loss,
            trial_loss=iteration.trial_loss,
            predicted=predicted,
            ratio=ratio,
            accepted=accepted,
            radius=radius,
            next_radius=following,
            step_norm=solution.norm,
            gradient_norm=iteration.norm,
            cg_iterations=used,
            on_boundary=solution.on_boundary,
            negative_curvature=solution.negative_curvature,
            propagations=propagations,
        )
        for group in self.param_groups:
            group["radius"] = following
            group["steps"] += 1
            group["accepted"] += int(accepted)
            group["cg_iterations"] += used
            group["negative_curvature"] += int(used > 0 and solution.negative_curvature)
            group["propagations"] += propagations

    def _solution(self, iteration: Iteration, radius: float) -> tuple[Solution, int]:
        """One found before, on the way to a larger region, or a new one; and products that it took."""
        for solution in iteration.solutions:
            if (
                math.isclose(solution.radius, radius, rel_tol=1e-12)
                if solution.on_boundary
                else solution.norm <= radius
            ):
                return solution, 0
        assert self._space is not None
        gradient, norm = iteration.gradient, iteration.norm
        if norm == 0:
            zero = torch.zeros_like(gradient)
            still = Solution(
                step=zero,
                norm=0.0,
                radius=radius,
                model=0.0,
                on_boundary=False,
                negative_curvature=False,
                iterations=0,
            )
            return still, 0
        decay = self._decay()
        objective = iteration.objective
        if iteration.tried is not None:
            objective.move(iteration.before)

        def product(vector: Tensor) -> Tensor:
            curved = objective.product(vector)
            return curved if decay is None else curved.addcmul_(decay, vector)

        iteration.solutions = steihaug(
            product,
            gradient,
            radius,
            tolerance=self.options.relative_tolerance(norm) * norm,
            max_iterations=self.options.max_cg_iterations or _UNBOUNDED * self._space.numel,
            precondition=self._precondition(),
            gram=self._space.gram,
            smaller_radii=self.options.smaller_radii(radius),
            stored=self.options.stored_radii,
            scale=1.0 if _SMALLEST <= norm <= _LARGEST else power_of_two_scale(norm),
        )
        return iteration.solutions[0], iteration.solutions[0].iterations

    def _decay(self) -> Tensor | None:
        """The weight decay of every element, as a local vector; None where there is none."""
        assert self._space is not None
        values = [float(group["weight_decay"]) for group in self.param_groups]
        return self._space.constant(values) if any(values) else None

    def _decay_loss(self, point: Tensor) -> float:
        """Half the squared parameters, each with its weight decay."""
        decay = self._decay()
        assert self._space is not None
        return 0.0 if decay is None else float(self._space.gram([decay * point, point])[0, 1]) / 2

    def _prepare_state(self) -> None:
        assert self._layout is not None
        if callable(self.options.preconditioner) and self._layout.engine != "dense":
            raise TypeError(
                f"a preconditioner function sees whole parameters, which {self._layout.engine} shards: choose "
                "'diagonal' or None"
            )
        if self.options.preconditioner != "diagonal":
            return
        for fragment, spec in zip(self._layout.fragments, self._layout.specs, strict=True):
            if spec.requires_grad and _SECOND_MOMENT not in self.state[fragment.tensor]:
                self.state[fragment.tensor][_SECOND_MOMENT] = torch.zeros_like(fragment.tensor)

    def _observe(self, gradient: Tensor) -> None:
        """Second moments of the gradients, for the diagonal preconditioner."""
        if self.options.preconditioner != "diagonal":
            return
        assert self._space is not None
        moments = [self.state[tensor][_SECOND_MOMENT] for tensor in self._space.tensors]
        local = self._space.read(moments)
        # the first gradient enters whole, so there is no bias to correct
        first = float(self._space.gram([local])[0, 0]) == 0
        weight = 1.0 if first else 1 - _DECAY
        # of gradients of 1e+20 as large as the dtype has them, so that what is divided by their roots is a step
        squares = gradient.square().clamp_(max=torch.finfo(gradient.dtype).max)
        self._space.write(local.lerp_(squares, weight), moments)

    def _precondition(self) -> Product | None:
        chosen, space = self.options.preconditioner, self._space
        assert space is not None
        if chosen is None:
            return None
        if callable(chosen):

            def apply(vector: Tensor) -> Tensor:
                found = chosen([view.clone() for view in space.views(vector)])
                return torch.cat([piece.reshape(-1).to(vector.dtype) for piece in found])

            return apply
        roots = space.read([self.state[tensor][_SECOND_MOMENT] for tensor in space.tensors]).sqrt_()
        mean = float(space.gram([roots, torch.ones_like(roots)])[0, 1]) / space.numel
        roots.add_(_RIDGE * mean).clamp_(min=math.sqrt(torch.finfo(roots.dtype).tiny))  # below, squares vanish
        return lambda vector: vector / roots
