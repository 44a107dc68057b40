"""What compare.py compares: SGD with BatchNorm, K-FAC without and with it, at two batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from settings import Settings

BUDGETS = (3, 4, 6, 8, 12)  # epochs; the schedule is fitted to each
TUNING_EPOCHS = 4  # the budget at which grids are run; the other budgets take the best of it
# of each batch size: what tuned SGD reaches in the longest budget, not at its last decimal; 2048 is provisional
TARGETS = {128: 0.91, 2048: 0.75}
LARGE = {"batch_size": 2048, "accumulate": 16}
KFAC = {"optimizer": "kfac", "warmup": 0.1}
# factors are running means over 1 / (1 - decay) updates, and runs are short: a few hundred steps, or a few dozen
KFAC_NORMAL = {"statistics_frequency": 5, "precondition_frequency": 20}
KFAC_LARGE = {"statistics_frequency": 1, "precondition_frequency": 5, "factor_decay": 0.9}


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Args:
        base: what is not tuned.
        lrs: grid, each twice the one before, extended while the best value is at an edge.
        second: name of another setting, tuned at the best learning rate.
        values: of it, besides the base's.
    """

    base: Settings
    lrs: Sequence[float]
    second: str = "warmup"
    values: Sequence[float] = ()

    @property
    def target(self) -> float:
        """Validation accuracy to be reached."""
        return TARGETS[self.base.batch_size]

    def owns(self, settings: Settings) -> bool:
        """Whether they differ from the base in what is tuned, the budget and the seed alone."""
        own = {name: getattr(settings, name) for name in ("lr", self.second, "epochs", "seed")}
        return replace(self.base, **own) == settings


def kfac(normalization: str, lrs: Sequence[float], **options: float) -> Contender:
    base = replace(Settings(**KFAC), normalization=normalization, **options)  # type: ignore[arg-type]
    return Contender(base, lrs, second="damping", values=(3e-4, 3e-3, 1e-2))


CONTENDERS = {
    "SGD, BatchNorm, 128": Contender(Settings(), (0.05, 0.1, 0.2, 0.4)),
    "SGD, BatchNorm, 2048": Contender(Settings(**LARGE), (0.2, 0.4, 0.8), values=(0.25,)),  # type: ignore[arg-type]
    "K-FAC, 128": kfac("none", (0.05, 0.1, 0.2), **KFAC_NORMAL),
    "K-FAC, 2048": kfac("none", (0.1, 0.2, 0.4), **LARGE, **KFAC_LARGE),
    "K-FAC, BatchNorm, 128": kfac("batch", (0.05, 0.1, 0.2), **KFAC_NORMAL),
    "K-FAC, BatchNorm, 2048": kfac("batch", (0.1, 0.2, 0.4), **LARGE, **KFAC_LARGE),
}
