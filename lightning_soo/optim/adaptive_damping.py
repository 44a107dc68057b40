"""Levenberg-Marquardt's rule for the damping: trust the quadratic model as far as it has predicted the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_soo.checks import require_whole_number
from lightning_soo.naming import nearest


@dataclass(frozen=True, kw_only=True)
class AdaptiveDamping:
    """When and by how much the damping changes (Martens and Grosse 2015, section 6.5).

    Attributes:
        interval: steps between two comparisons; each costs two forward passes.
        factor: the damping is multiplied by ``factor ** interval`` where the reduction was more than ``high`` of the
            predicted one, and divided by it where it was less than ``low``.
        low, high: of the ratio of actual to predicted reduction.
        minimum, maximum: of the damping.
    """

    interval: int = 5
    factor: float = 0.95
    low: float = 0.25
    high: float = 0.75
    minimum: float = 1e-8
    maximum: float = 1e2

    @classmethod
    def parse(cls, value: bool | Mapping[str, Any] | AdaptiveDamping | None) -> AdaptiveDamping | None:
        """Take None or False, True, or a mapping of the fields.

        Raises:
            ValueError: an unknown key, with the nearest one, or a value out of range.
        """
        if value is None or value is False or isinstance(value, AdaptiveDamping):
            return value or None
        given = {} if value is True else dict(value)
        names = [entry.name for entry in fields(cls)]
        for key in given:
            if key not in names:
                raise ValueError(f"adaptive_damping: unknown key {key!r}{nearest(str(key), names)}")
        return cls(**given)

    def __post_init__(self) -> None:
        require_whole_number("adaptive_damping: interval", self.interval, minimum=1)
        if not 0 < self.factor < 1:
            raise ValueError(f"adaptive_damping: factor={self.factor}: must be in (0, 1)")
        if not 0 < self.low < self.high:
            raise ValueError(f"adaptive_damping: low={self.low}, high={self.high}: must be 0 < low < high")
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(f"adaptive_damping: minimum={self.minimum}, maximum={self.maximum}: must be in order")

    def adapted(self, damping: float, *, actual: float, predicted: float) -> float:
        """The next damping.

        Args:
            actual: change of the loss; not finite where the step left the region in which it is defined.
            predicted: change of the quadratic model, below zero.
        """
        ratio = actual / predicted if predicted < 0 and math.isfinite(actual) else -math.inf
        change = self.factor**self.interval
        if ratio > self.high:
            damping *= change
        elif ratio < self.low:
            damping /= change
        return min(max(damping, self.minimum), self.maximum)
