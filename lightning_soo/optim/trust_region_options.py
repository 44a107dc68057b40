"""Options of TrustRegionNewtonCG, checked once, and what one iteration has done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lightning_soo.naming import nearest
from lightning_soo.optim.curvature import CURVATURES
from lightning_soo.optim.options import require_timeout
from lightning_soo.optim.radius_rules import RadiusRule, radius_rule

Preconditioner = Callable[[list[Tensor]], list[Tensor]]
_SMALLER = 64  # more rejections in a row than a radius is looked for
NONFINITE = ("skip", "raise")


@dataclass(frozen=True, kw_only=True)
class TrustRegionOptions:
    """The meaning of each field stands in :class:`lightning_soo.TrustRegionNewtonCG`."""

    rule: RadiusRule
    max_radius: float
    curvature: str = "hessian"
    hessian_fraction: float = 1.0
    max_cg_iterations: int | None = None
    cg_tolerance: float | None = None
    preconditioner: str | Preconditioner | None = None
    retries: int = 0
    stored_radii: int = 4
    keep_graphs: bool | None = None
    nonfinite: str = "skip"
    seed: int = 0
    collective_timeout: float | None = None

    @classmethod
    def parse(
        cls, *, preset: str | RadiusRule, max_radius: float | None, max_cg_iterations: int | None, **options: object
    ) -> TrustRegionOptions:
        """Fill in what the preset says.

        Raises:
            ValueError: an option out of range, named with its value.
        """
        rule = radius_rule(preset)
        made = cls(
            rule=rule,
            max_radius=rule.max_radius if max_radius is None else max_radius,
            max_cg_iterations=rule.max_cg_iterations if max_cg_iterations is None else max_cg_iterations,
            **options,  # type: ignore[arg-type]
        )
        made._check()
        return made

    def _check(self) -> None:
        def need(good: bool, name: str, wanted: str) -> None:
            if not good:
                raise ValueError(f"{name}={getattr(self, name)!r}: {wanted}")

        require_timeout(self.collective_timeout)
        for name, choices in (("curvature", CURVATURES), ("nonfinite", NONFINITE)):
            value = getattr(self, name)
            need(value in choices, name, f"unknown{nearest(str(value), choices)}")
        need(self.max_radius > 0, "max_radius", "must be above 0")
        need(0 < self.hessian_fraction <= 1, "hessian_fraction", "must be in (0, 1]")
        need(
            self.max_cg_iterations is None or self.max_cg_iterations >= 1,
            "max_cg_iterations",
            "must be at least 1, or None for the preset's",
        )
        need(
            self.cg_tolerance is None or 0 <= self.cg_tolerance < 1,
            "cg_tolerance",
            "relative to the norm of the gradient: must be in [0, 1), or None for min(0.5, sqrt(norm))",
        )
        need(
            self.preconditioner in (None, "diagonal") or callable(self.preconditioner),
            "preconditioner",
            "choose None, 'diagonal', or a function of a list of tensors",
        )
        need(self.retries >= 0, "retries", "must be at least 0")
        need(self.stored_radii >= 0, "stored_radii", "must be at least 0")
        need(self.keep_graphs in (None, True, False), "keep_graphs", "choose True, False or None")

    def relative_tolerance(self, norm: float) -> float:
        """At which share of the gradient's norm the residual is small enough."""
        return min(0.5, math.sqrt(norm)) if self.cg_tolerance is None else self.cg_tolerance

    def smaller_radii(self, radius: float) -> list[float]:
        """Those that rejections would lead to."""
        return [radius * self.rule.shrink**power for power in range(1, _SMALLER + 1)]


@dataclass(frozen=True, kw_only=True)
class TrustRegionStep:
    """One trust-region iteration.

    Attributes:
        loss, trial_loss: of the batch before the step and after it (the latter also where it was rejected).
        predicted: reduction that the quadratic model expected.
        ratio: of actual to predicted reduction; minus infinity where the trial loss is not finite.
        accepted: whether the parameters have moved.
        radius: of the region in which the step was looked for; ``next_radius`` that of the next one.
        step_norm, gradient_norm: Euclidean; the step's in the preconditioner's norm where there is one.
        cg_iterations: products with the curvature that this iteration took; 0 where stored ones were used.
        on_boundary, negative_curvature: what ended the conjugate gradients.
        propagations: forward and backward passes, times the weights of what they went through.
    """

    loss: float
    trial_loss: float
    predicted: float
    ratio: float
    accepted: bool
    radius: float
    next_radius: float
    step_norm: float
    gradient_norm: float
    cg_iterations: int
    on_boundary: bool
    negative_curvature: bool
    propagations: float

    def figures(self) -> dict[str, float]:
        """What a logger is told of it."""
        return {
            "radius": self.next_radius,
            "ratio": self.ratio,
            "accepted": float(self.accepted),
            "step_norm": self.step_norm,
            "gradient_norm": self.gradient_norm,
            "cg_iterations": float(self.cg_iterations),
            "on_boundary": float(self.on_boundary),
            "negative_curvature": float(self.negative_curvature),
        }
