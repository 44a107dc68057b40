"""Shampoo's options that hold for the whole optimizer, typed and validated once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_soo.checks import require_choice, require_whole_number
from lightning_soo.dtypes import parse_dtype
from lightning_soo.naming import nearest
from lightning_soo.placement.blocks import Block, BlockRules
from lightning_soo.placement.chains import CHAINS
from lightning_soo.placement.costs import product_flops
from lightning_soo.placement.overrides import Override
from lightning_soo.refresh.schedule import RAREST_STATISTICS, Interval, statistics_within
from lightning_soo.refresh.workers import WorkerOptions

if TYPE_CHECKING:
    from typing_extensions import Self

GRAFTS = ("sgd", "adagrad", "rmsprop", "adam", "adagrad_normalized", "rmsprop_normalized")
WITH_SECOND_MOMENTS = GRAFTS[1:]
_WITH_DECAY = ("rmsprop", "adam", "rmsprop_normalized")  # their second moment is a running mean
GRAFT_NORMS = ("parameter", "block")
NONFINITE = ("skip", "raise")
BASES = ("eigh", "qr")
AUTOMATIC = "auto"
PAPERS_EXPONENT = "2k"
# below this a product takes longer in bfloat16: 64 x 64 has 1e6 flops, 256 x 256 has 7e7
_BFLOAT16_FLOPS = 1e7
# what a parameter group may set for itself; everything else belongs to the optimizer (or to `overrides`)
GROUP_OPTIONS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "decoupled_weight_decay",
    "momentum",
    "dampening",
    "nesterov",
)


@dataclass(frozen=True, kw_only=True)
class ShampooOptions:
    """The meaning of each field stands in :class:`lightning_soo.Shampoo`."""

    preconditioner_eps: float = 1e-6
    relative_eps: bool = True
    use_bias_correction: bool = True
    precondition_frequency: Interval = field(default_factory=lambda: Interval.parse(20))
    refresh_delay: int | None = None
    stagger: bool = True
    gather_frequency: int | None = None
    statistics_frequency: int = 1
    statistics_follow_interval: bool = False  # more often while the interval is short
    start_preconditioning_step: int | None = None
    max_preconditioner_dim: int = 1024
    max_factor_dim: int | None = None
    merge_dims: str = "kernel"
    precondition_1d: bool = False
    one_sided_above: int | None = None
    diagonal_rows: bool = False
    exponent_override: float | str | None = None
    grafting: str | None = "adam"
    grafting_beta2: float | None = None
    grafting_norm: str = "parameter"
    chain: str | None = None  # bands along chains in place of blocks (SONew)
    basis: str = "eigh"  # how SOAP refreshes its bases
    own_step_size: bool = False  # the direction has the step size of Adam by itself (SOAP)
    nonfinite: str = "skip"
    exchange_bucket_bytes: int = 2**25
    collective_timeout: float | None = None
    compute_dtype: torch.dtype | str | None = None
    overrides: tuple[Override, ...] = ()
    workers: WorkerOptions = field(default_factory=WorkerOptions)
    ridge: ClassVar[str] = "preconditioner_eps"  # what to raise where a matrix cannot be inverted
    limit: ClassVar[str | None] = "max_factor_dim"  # what to lower where refreshes take too long
    in_place_of_blocks: ClassVar[str | None] = None  # what a method has to which no option of blocks applies

    @classmethod
    def parse(
        cls,
        *,
        overrides: Sequence[Mapping[str, Any]] | None,
        workers: str | WorkerOptions | Mapping[str, Any],
        compute_dtype: torch.dtype | str | None,
        precondition_frequency: int | Interval | Mapping[str, Any],
        statistics_frequency: int | None = None,
        **options: Any,
    ) -> Self:
        """Build from what a user or a configuration file writes: plain values, dtypes by name."""
        interval = Interval.parse(precondition_frequency)
        follow = statistics_frequency is None
        if statistics_frequency is None:
            statistics_frequency = min(RAREST_STATISTICS, statistics_within(interval.max))
        return cls(
            overrides=tuple(Override.from_mapping(entry) for entry in overrides or ()),
            workers=WorkerOptions.parse(workers),
            compute_dtype=AUTOMATIC
            if compute_dtype == AUTOMATIC
            else parse_dtype("compute_dtype", compute_dtype, [AUTOMATIC]),
            precondition_frequency=interval,
            statistics_frequency=statistics_frequency,
            statistics_follow_interval=follow,
            **options,
        )

    def __post_init__(self) -> None:
        self.block_rules.check()
        for entry in self.overrides:
            if self.in_place_of_blocks is not None and entry.rules:
                raise ValueError(
                    f"overrides, match={entry.match!r}: {next(iter(entry.rules))!r} does not apply to "
                    f"{self.in_place_of_blocks}; leave parameters out with 'method': 'none'"
                )
        for name in ("statistics_frequency", "exchange_bucket_bytes"):
            require_whole_number(name, getattr(self, name), minimum=1)
        for name in ("gather_frequency", "start_preconditioning_step"):
            require_whole_number(name, getattr(self, name), minimum=1, optional=True)
        require_whole_number("refresh_delay", self.refresh_delay, minimum=0, optional=True)
        require_timeout(self.collective_timeout)
        if not self.preconditioner_eps >= 0:
            raise ValueError(f"preconditioner_eps={self.preconditioner_eps}: must be at least 0")
        override = self.exponent_override
        if isinstance(override, str):
            if override != PAPERS_EXPONENT:
                raise ValueError(f"exponent_override={override!r}{nearest(override, [PAPERS_EXPONENT])}, or a number")
        elif override is not None and not override > 0:
            raise ValueError(f"exponent_override={override}: the p of A^(-1/p) must be above 0")
        if self.grafting_beta2 is not None and not 0 <= self.grafting_beta2 <= 1:
            raise ValueError(f"grafting_beta2={self.grafting_beta2}: must be in [0, 1]")
        for name, choices in (
            ("grafting_norm", GRAFT_NORMS),
            ("nonfinite", NONFINITE),
            ("basis", BASES),
        ):
            require_choice(name, getattr(self, name), choices)
        if self.grafting is not None and self.grafting not in GRAFTS:
            raise ValueError(f"grafting={self.grafting!r}{nearest(str(self.grafting), GRAFTS)} (or None)")

    @property
    def fallback(self) -> str | None:
        """What moves the parameters that are not preconditioned."""
        return "adam" if self.own_step_size else self.grafting

    @property
    def start(self) -> int:
        """``start_preconditioning_step`` with its default, the (first) interval."""
        return self.start_preconditioning_step or self.precondition_frequency.first

    @property
    def block_rules(self) -> BlockRules:
        return BlockRules(
            max_preconditioner_dim=self.max_preconditioner_dim,
            max_factor_dim=self.max_factor_dim,
            merge_dims=self.merge_dims,
            precondition_1d=self.precondition_1d,
            one_sided_above=self.one_sided_above,
        )

    def has_diagonal_rows(self, block: Block) -> bool:
        """Whether second moments of the graft precondition a block's rows, which have no matrix."""
        return self.diagonal_rows and block.has_free_rows and self.grafting in WITH_SECOND_MOMENTS

    def exponent(self, block: Block) -> float | None:
        """``p`` of the roots ``A^(-1/p)`` of a block; None where it depends on the gradients.

        With ``k`` preconditioned dimensions the papers have ``2 k``, for which regret has a bound (Gupta et al. 2018).
        """
        if isinstance(self.exponent_override, float | int):
            return self.exponent_override
        dimensions = len(block.dims) + self.has_diagonal_rows(block)
        return None if self.exponent_override is None and dimensions > 1 else 2.0 * dimensions

    def statistics_dtype(self, parameter_dtype: torch.dtype) -> torch.dtype:
        """float32, or float64 for float64 parameters: squares of half-precision numbers need the range."""
        return torch.float64 if parameter_dtype == torch.float64 else torch.float32

    def root_dtype(self, parameter_dtype: torch.dtype, block: Block, *, fast_bfloat16: bool) -> torch.dtype:
        """``compute_dtype``, else that of the statistics.

        Args:
            fast_bfloat16: whether products in bfloat16 are much faster than in float32, on every rank: then
                ``"auto"`` is bfloat16 for blocks that are large enough.
        """
        if isinstance(self.compute_dtype, torch.dtype):
            return self.compute_dtype
        wide = self.statistics_dtype(parameter_dtype)
        if self.compute_dtype is None or wide != torch.float32 or not fast_bfloat16:
            return wide
        return torch.bfloat16 if product_flops(block) >= _BFLOAT16_FLOPS else wide


@dataclass(frozen=True, kw_only=True)
class SONewOptions(ShampooOptions):
    """The meaning of each field stands in :class:`lightning_soo.SONew`."""

    bandwidth: int = 1
    gamma: float | None = None
    fused: bool | None = None
    compiled: bool = False
    band_dtype: torch.dtype | None = None
    in_place_of_blocks: ClassVar[str | None] = "chains"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole_number("bandwidth", self.bandwidth, minimum=0)
        require_choice("chain", str(self.chain), CHAINS)
        if self.gamma is not None and not 0 <= self.gamma < 1:
            raise ValueError(f"gamma={self.gamma}: must be in [0, 1), or None")

    def dtype_of_bands(self, parameter_dtype: torch.dtype) -> torch.dtype:
        """As asked for, else that of Shampoo's statistics."""
        return self.band_dtype or self.statistics_dtype(parameter_dtype)

    @property
    def edge_gamma(self) -> float:
        """``gamma``, or what keeps float32 within a cosine of .998 of float64 from the first steps on (measured)."""
        if self.gamma is not None:
            return self.gamma
        return 1e-5 if self.bandwidth <= 1 else 1e-3


def adam_group(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, decoupled_weight_decay: bool
) -> dict[str, Any]:
    """A parameter group of an optimizer whose direction has the step size of Adam, and no momentum after it."""
    return parameter_group(lr, betas, eps, weight_decay, decoupled_weight_decay, 0.0, 0.0, False)


def parameter_group(
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> dict[str, Any]:
    """The settings of a parameter group, as every optimizer here has them."""
    return {
        "lr": lr,
        "betas": tuple(betas),
        "eps": eps,
        "weight_decay": weight_decay,
        "decoupled_weight_decay": decoupled_weight_decay,
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
    }


def validate_group(group: Mapping[str, Any], where: str) -> None:
    """Check the options of one parameter group.

    Raises:
        ValueError: names the option, its value and the group.
    """
    for name in ("lr", "eps", "weight_decay", "momentum"):
        if not 0 <= float(group[name]) < math.inf:
            raise ValueError(f"{name}={group[name]} ({where}): must be at least 0, and finite")
    if not math.isfinite(group["dampening"]):
        raise ValueError(f"dampening={group['dampening']} ({where}): must be finite")
    beta1, beta2 = group["betas"]
    if not 0 <= beta1 < 1:
        raise ValueError(f"betas[0]={beta1} ({where}): must be in [0, 1)")
    if not 0 <= beta2 <= 1:
        raise ValueError(f"betas[1]={beta2} ({where}): must be in [0, 1]; 1 is the plain sum")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(f"nesterov=True ({where}): needs momentum above 0 and dampening=0")


def refuse_plain_sum(options: ShampooOptions, group: Mapping[str, Any], where: str) -> None:
    """``betas[1] = 1`` is a plain sum of statistics, but a second moment that never moves where it is a running mean.

    Raises:
        ValueError: it would be that of a graft, of SOAP or of what moves the rest.
    """
    own = options.grafting_beta2
    found = next((name for name in (options.grafting, options.fallback) if name in _WITH_DECAY), None)
    if found is None or (float(group["betas"][1]) if own is None else own) < 1:
        return
    if options.own_step_size:
        raise ValueError(f"betas[1]={group['betas'][1]} ({where}): must be below 1 here, or second moments stay at 0")
    said = f"betas[1]={group['betas'][1]} ({where})" if own is None else f"grafting_beta2={own}"
    raise ValueError(
        f"{said}: the second moment of {found!r}, the graft, would stay at 0: set grafting_beta2 below 1, or "
        "grafting to 'adagrad', which is a plain sum, 'sgd' or None"
    )


def require_timeout(seconds: float | None) -> None:
    """
    Raises:
        ValueError: a bound on collectives that is none.
    """
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"collective_timeout={seconds!r}: must be above zero seconds, or None")


def refuse_repeated(groups: list[dict[str, Any]]) -> None:
    """Take the last group back if it holds a parameter twice, of which torch only warns: it would be moved twice.

    Raises:
        ValueError: names the parameter.
    """
    seen: dict[int, int] = {}
    for index, parameter in enumerate(groups[-1]["params"]):
        if id(parameter) in seen:
            group = groups.pop()
            names = group.get("param_names") or [f"group{len(groups)}.{i}" for i in range(len(group["params"]))]
            raise ValueError(
                f"parameter {names[seen[id(parameter)]]!r} is given twice (again as {names[index]!r}): give tied "
                "weights once, as model.parameters() does"
            )
        seen[id(parameter)] = index
