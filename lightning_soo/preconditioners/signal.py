"""How much of a gradient is signal: what successive ones have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

_DECAY = 0.9  # of one observation: about ten count


@dataclass
class GradientSignal:
    """An estimate of ``|E G|^2 / E |G|^2``, which is 1 / (1 + noise) (the noise scale of McCandlish et al. 2018).

    The noise of a gradient is independent of that of earlier ones, so its inner product with their running mean has the
    expectation ``|E G|^2``: no second copy of gradients is needed, nor a second batch.

    Attributes:
        common: running mean of the inner products.
        energy: running mean of ``|G|^2``, with the same weights.
    """

    common: float = 0.0
    energy: float = 0.0

    def observe(self, common: float, energy: float) -> None:
        """Add one gradient.

        Args:
            common: inner product of the gradient and the running mean of those before it.
            energy: sum of the gradient's squares.
        """
        if math.isfinite(common) and math.isfinite(energy):
            self.common += (1.0 - _DECAY) * (common - self.common)
            self.energy += (1.0 - _DECAY) * (energy - self.energy)

    @property
    def share(self) -> float:
        """From 0, noise alone, to 1, gradients that agree; 1 as long as nothing is known."""
        return min(1.0, max(0.0, self.common / self.energy)) if self.energy > 0.0 else 1.0
