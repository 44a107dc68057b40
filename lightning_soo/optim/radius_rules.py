"""When a trust-region step is accepted, and how large the next region is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_soo.naming import nearest


@dataclass(frozen=True, kw_only=True)
class RadiusRule:
    """Thresholds for the ratio of the actual to the predicted reduction of the loss.

    Attributes:
        accept: a step whose ratio is not above it is rejected.
        low, high: the radius is multiplied by ``shrink`` where the ratio is below ``low``, by ``grow`` where it is
            above ``high``, and by ``keep`` between them.
        only_at_boundary: whether only steps that the region has cut let it ``grow``.
        below_step: whether the radius after a rejection excludes the rejected step: it is shrunk again where the next
            region would only give the same step.
        max_radius: of the region.
        max_cg_iterations: products with the curvature in one step; None is as many as it takes.
    """

    accept: float
    low: float
    high: float
    shrink: float
    keep: float
    grow: float
    only_at_boundary: bool
    below_step: bool
    max_radius: float
    max_cg_iterations: int | None

    def accepts(self, ratio: float) -> bool:
        return ratio > self.accept

    def next_radius(
        self, radius: float, ratio: float, *, step_norm: float, on_boundary: bool, max_radius: float
    ) -> float:
        """The radius of the next region; a ratio that is not a number counts as minus infinity."""
        if math.isnan(ratio) or ratio < self.low:
            smaller = radius * self.shrink
            while self.below_step and not self.accepts(ratio) and smaller >= step_norm > 0:
                smaller *= self.shrink
            return smaller
        factor = self.keep
        if ratio > self.high and (on_boundary or not self.only_at_boundary):
            factor = self.grow
        return min(radius * factor, max_radius)


PRESETS = {
    # scipy.optimize.minimize(method="trust-ncg")
    "scipy": RadiusRule(
        accept=0.15,
        low=0.25,
        high=0.75,
        shrink=0.25,
        keep=1.0,
        grow=2.0,
        only_at_boundary=True,
        below_step=False,
        max_radius=1000.0,
        max_cg_iterations=None,
    ),
    # Xu, Roosta and Mahoney 2020, Second-order optimization for non-convex machine learning
    "xu": RadiusRule(
        accept=1e-4,
        low=1e-4,
        high=0.8,
        shrink=0.5,
        keep=1.2,
        grow=2.0,
        only_at_boundary=False,
        below_step=True,
        max_radius=1e6,
        max_cg_iterations=250,
    ),
}


def radius_rule(preset: str | RadiusRule) -> RadiusRule:
    """A preset by name, or the user's own rule.

    Raises:
        ValueError: an unknown name, with the nearest one.
    """
    if isinstance(preset, RadiusRule):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown{nearest(str(preset), PRESETS)}")
    return PRESETS[preset]
