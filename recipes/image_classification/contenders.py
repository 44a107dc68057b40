"""What compare.py compares: SGD and Shampoo with BatchNorm, K-FAC without and with it, at two batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from settings import Settings

BUDGETS = (3, 4, 6, 8, 12)  # epochs; the schedule is fitted to each
TUNING_EPOCHS = 4  # the budget at which grids are run; the other budgets take the best of it
# of each batch size: what tuned SGD reaches, not at its last decimal
TARGETS = {128: 0.90, 2048: 0.77}
LADDERS = {128: (0.85, 0.87, 0.885, 0.89, 0.90, 0.905), 2048: (0.65, 0.70, 0.73, 0.75, 0.77)}
LARGE = {"batch_size": 2048, "accumulate": 16}
# found in about twenty exploratory runs of two to five epochs: runs are short, so factors forget quickly and the first
# inversion comes at once
KFAC_128 = Settings(
    optimizer="kfac",
    warmup=0.05,
    weight_decay=0.3,
    damping=3e-4,
    kl_clip=0.0,
    statistics_frequency=1,
    precondition_frequency=5,
    factor_decay=0.98,
    start_preconditioning_step=5,
    statistics_positions=64,
)
KFAC_2048 = Settings(
    optimizer="kfac",
    weight_decay=0.02,
    damping=3e-3,
    kl_clip=0.03,
    statistics_frequency=1,
    precondition_frequency=2,
    factor_decay=0.7,
    start_preconditioning_step=1,
    statistics_positions=16,
    **LARGE,  # type: ignore[arg-type]
)
PLAIN_128 = Settings(
    optimizer="kfac",
    normalization="none",
    weight_decay=0.02,
    damping=3e-3,
    kl_clip=3e-4,
    statistics_frequency=5,
    precondition_frequency=20,
    start_preconditioning_step=5,
    statistics_positions=64,
)
PLAIN_2048 = replace(KFAC_2048, normalization="none", kl_clip=5e-4)
SHAMPOO_128 = Settings(
    optimizer="shampoo",
    beta2=0.99,
    statistics_frequency=2,
    precondition_frequency=20,
    start_preconditioning_step=10,
)
VIT = Settings(
    model="vit",
    width=64,
    lr=2e-3,
    weight_decay=0.05,
    beta2=0.99,
    epochs=4,
    statistics_frequency=2,
    precondition_frequency=20,
    start_preconditioning_step=10,
)


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


def kfac(base: Settings, lrs: Sequence[float]) -> Contender:
    return Contender(base, lrs, second="damping", values=(base.damping / 3, base.damping * 3))


# for train.py: the best of what was run
TUNED = (
    Settings(lr=0.2, epochs=6),
    Settings(lr=0.1, epochs=8, warmup=0.3, **LARGE),  # type: ignore[arg-type]
    replace(KFAC_128, lr=1e-3, epochs=4),
    replace(KFAC_2048, lr=1e-2, epochs=4),
    replace(PLAIN_128, lr=3e-3, epochs=4),
    replace(PLAIN_2048, lr=1e-2, epochs=4),
    Settings(optimizer="adamw", lr=2e-3, weight_decay=0.05, epochs=6),  # a usual choice, not tuned
    replace(SHAMPOO_128, lr=0.1, epochs=4),
    # usual choices too
    replace(SHAMPOO_128, optimizer="soap", lr=3e-3, weight_decay=0.05, epochs=4),
    Settings(optimizer="sonew", lr=2e-3, weight_decay=0.05, epochs=4),
    *(replace(VIT, optimizer=name) for name in ("adamw", "soap", "sonew")),
    replace(VIT, optimizer="shampoo", grafting="adam"),
    Settings(model="resnet50", lr=0.1, epochs=6),
)

CONTENDERS = {
    "SGD, BatchNorm, 128": Contender(Settings(), (0.05, 0.1, 0.2, 0.4)),
    "Shampoo, BatchNorm, 128": Contender(SHAMPOO_128, (0.05, 0.1, 0.2, 0.4)),
    "K-FAC, BatchNorm, 128": kfac(KFAC_128, (5e-4, 1e-3, 2e-3)),
    "K-FAC, 128": kfac(PLAIN_128, (1e-3, 3e-3, 1e-2)),
    "SGD, BatchNorm, 2048": Contender(Settings(**LARGE), (0.1, 0.2, 0.4), values=(0.3,)),  # type: ignore[arg-type]
    "K-FAC, BatchNorm, 2048": kfac(KFAC_2048, (3e-3, 1e-2, 3e-2)),
    "K-FAC, 2048": kfac(PLAIN_2048, (3e-3, 1e-2, 3e-2)),
}
