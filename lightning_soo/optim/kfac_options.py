"""K-FAC's options that hold for the whole optimizer, typed and validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_soo.checks import require_choice, require_whole_number
from lightning_soo.optim.adaptive_damping import AdaptiveDamping
from lightning_soo.optim.options import ShampooOptions

DAMPING_METHODS = ("exact", "pi")
FISHERS = ("empirical", "mc", "ggn")
APPROXIMATIONS = ("expand", "reduce")
LIKELIHOODS = ("categorical", "gaussian")
FALLBACKS = ("sgd", "adam")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True, kw_only=True)
class KFACOptions(ShampooOptions):
    """The meaning of each field stands in :class:`lightning_soo.KFAC`."""

    damping: float = 1e-3
    damping_method: str = "exact"
    kl_clip: float | None = 1e-3
    kl_clip_decay: float = 1.0
    adaptive_damping: AdaptiveDamping | None = None
    fisher: str = "empirical"
    likelihood: str = "categorical"
    outputs: str | None = None
    approximation: str = "expand"
    factor_decay: float = 0.95
    batch_reduction: str = "mean"
    moves_the_rest: str = "sgd"
    statistics_ranks: int | None = None
    statistics_positions: int | None = None
    gram_dtype: torch.dtype | None = None
    input_shapes: tuple[tuple[str, tuple[int, int]], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping}: must be above 0")
        if self.kl_clip is not None and not self.kl_clip > 0:
            raise ValueError(f"kl_clip={self.kl_clip}: must be above 0, or None for no bound")
        if self.adaptive_damping is not None and self.grafting is not None:
            raise ValueError(
                f"adaptive_damping has no effect with grafting={self.grafting!r}, which an AdamW that is taken over "
                "gives: take over SGD, set grafting to None, or leave adaptive_damping out"
            )
        if self.gram_dtype == torch.float16:
            raise ValueError("gram_dtype=torch.float16: sums of squares overflow in it; use torch.bfloat16")
        if not 0 < self.kl_clip_decay <= 1:
            raise ValueError(f"kl_clip_decay={self.kl_clip_decay}: must be in (0, 1]")
        if not 0 <= self.factor_decay < 1:
            raise ValueError(f"factor_decay={self.factor_decay}: must be in [0, 1)")
        for name in ("statistics_ranks", "statistics_positions"):
            require_whole_number(name, getattr(self, name), minimum=1, optional=True)
        for name, choices in (
            ("damping_method", DAMPING_METHODS),
            ("fisher", FISHERS),
            ("likelihood", LIKELIHOODS),
            ("approximation", APPROXIMATIONS),
            ("batch_reduction", REDUCTIONS),
            ("moves_the_rest", FALLBACKS),
        ):
            require_choice(name, getattr(self, name), choices)

    ridge: ClassVar[str] = "damping"
    limit: ClassVar[str | None] = None  # layers are not cut
    in_place_of_blocks: ClassVar[str | None] = "layers"

    @property
    def fallback(self) -> str | None:
        """What moves the parameters that are not preconditioned."""
        return self.moves_the_rest if self.grafting is None else self.grafting
