"""The optimizers of the study. One registered function each: from model, seed and the two axes to an optimizer.

Importing this needs no torch: reports read labels and axes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Axis:
    """One axis of a grid.

    Args:
        middle: value in the middle of the grid.
        factor: from one value to the next.
        kind: ``"value"``; ``"complement"``: one minus the value is multiplied (momentum, decays); ``"whole"``: rounded.
        limit: values end there.
    """

    middle: float
    factor: float
    kind: str = "value"
    limit: float | None = None

    def values(self, size: int, scale: float = 1.0) -> tuple[float, ...]:
        """`size` values in order around the middle, which (or whose complement) is multiplied by `scale`."""
        found = []
        for index in range(size):
            step = self.factor ** (index - size // 2)
            if self.kind == "complement":
                value = 1 - float(f"{(1 - self.middle) * scale / step:.3g}")
                value = max(0.0, round(value, 6))
            else:
                value = float(f"{self.middle * scale * step:.3g}")
            if self.kind == "whole":
                value = max(1, round(value))
            found.append(value if self.limit is None else min(value, self.limit))
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Method:
    """
    Args:
        label: for people.
        order: 1, or 2 where curvature is used.
        axes: the two settings that are tuned, by name; the first is the step's size (lr or radius).
        make: called with the model, ``seed`` and a value for each axis; returns a torch optimizer, or one with
            ``step_on`` (trust regions), which takes the loss as a function of a batch.
        default: whether it is run when none is named.
    """

    name: str
    label: str
    order: int
    axes: dict[str, Axis]
    make: Callable[..., Any]
    default: bool = True

    def grid(self, sizes: tuple[int, int], scales: tuple[float, float] = (1.0, 1.0)) -> list[dict[str, float]]:
        """``sizes[0] * sizes[1]`` settings, each axis around its middle times its scale.

        Raises:
            ValueError: an axis has fewer values than asked for: its limit is too near.
        """
        (first, x), (second, y) = self.axes.items()
        columns, rows = x.values(sizes[0], scales[0]), y.values(sizes[1], scales[1])
        for name, values, size in ((first, columns, sizes[0]), (second, rows, sizes[1])):
            if len(values) != size:
                raise ValueError(f"{self.name}: axis {name} has {len(values)} values of {size}: {values}")
        return [{first: a, second: b} for a in columns for b in rows]


METHODS: dict[str, Method] = {}


def method(
    label: str, order: int, default: bool = True, **axes: Axis
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function, under its own name.

    Args:
        axes: two, in the order of the grid.

    Raises:
        ValueError: not two axes, or the name is taken.
    """

    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        name = make.__name__
        if len(axes) != 2:
            raise ValueError(f"{name}: a grid has two axes, not {len(axes)} ({', '.join(axes)})")
        if name in METHODS:
            raise ValueError(f"{name}: there is a method of this name already")
        METHODS[name] = Method(name, label, order, dict(axes), make, default)
        return make

    return register


MOMENTUM = 0.9


@method("SGD, momentum", order=1, lr=Axis(0.1, 4), momentum=Axis(MOMENTUM, 10**0.5, "complement"))
def sgd(model: nn.Module, seed: int, lr: float, momentum: float) -> Any:
    import torch

    return torch.optim.SGD(model.parameters(), lr, momentum=momentum)


@method("AdamW", order=1, lr=Axis(4e-3, 4), beta2=Axis(0.99, 10**0.5, "complement"))
def adamw(model: nn.Module, seed: int, lr: float, beta2: float) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), lr, betas=(MOMENTUM, beta2), weight_decay=0.0)


@method("K-FAC", order=2, lr=Axis(0.02, 4), damping=Axis(1e-2, 10))
def kfac(model: nn.Module, seed: int, lr: float, damping: float) -> Any:
    """Factors of the gradients of training themselves: no pass beside SGD's two. No bound on the step besides."""
    from lightning_soo import KFAC

    return KFAC(
        model,
        lr,
        momentum=MOMENTUM,
        damping=damping,
        kl_clip=None,
        statistics_frequency=1,
        precondition_frequency=5,
        refresh_delay=0,
        stagger=False,
        start_preconditioning_step=1,
        factor_decay=0.9,
        workers="inline",
    )


@method("Shampoo", order=2, lr=Axis(8e-3, 4), preconditioner_eps=Axis(1e-4, 100))
def shampoo(model: nn.Module, seed: int, lr: float, preconditioner_eps: float) -> Any:
    from lightning_soo import Shampoo

    return Shampoo(
        model,
        lr,
        betas=(MOMENTUM, 0.99),
        preconditioner_eps=preconditioner_eps,
        precondition_frequency=5,
        refresh_delay=0,
        stagger=False,
        start_preconditioning_step=2,
        exponent_override="2k",
        max_preconditioner_dim=512,
        max_factor_dim=None,
        workers="inline",
    )


@method("SONew", order=2, lr=Axis(0.016, 4), eps=Axis(1e-6, 100))
def sonew(model: nn.Module, seed: int, lr: float, eps: float) -> Any:
    from lightning_soo import SONew

    return SONew(model, lr, betas=(MOMENTUM, 0.99), eps=eps, start_preconditioning_step=5)


@method("TRCG", order=2, radius=Axis(1.0, 4), max_cg_iterations=Axis(5, 2.5, "whole"))
def trcg(model: nn.Module, seed: int, radius: float, max_cg_iterations: float) -> Any:
    """The Hessian of the whole batch, with its negative curvature."""
    return _trust_region(model, seed, radius, max_cg_iterations=int(max_cg_iterations), hessian_fraction=1.0)


@method("STRCG", order=2, radius=Axis(1.0, 4), hessian_fraction=Axis(0.25, 2, limit=1.0))
def strcg(model: nn.Module, seed: int, radius: float, hessian_fraction: float) -> Any:
    """The Hessian of a part of the batch."""
    return _trust_region(model, seed, radius, max_cg_iterations=10, hessian_fraction=hessian_fraction)


@method("TRCG, Gauss-Newton", order=2, default=False, radius=Axis(1.0, 4), max_cg_iterations=Axis(5, 2.5, "whole"))
def trcg_gauss_newton(model: nn.Module, seed: int, radius: float, max_cg_iterations: float) -> Any:
    """Without negative curvature."""
    return _trust_region(
        model,
        seed,
        radius,
        max_cg_iterations=int(max_cg_iterations),
        hessian_fraction=1.0,
        curvature="gauss_newton",
    )


def _trust_region(model: nn.Module, seed: int, radius: float, curvature: str = "hessian", **options: Any) -> Any:
    from lightning_soo import TrustRegionNewtonCG

    return TrustRegionNewtonCG(model, radius=radius, preset="xu", curvature=curvature, seed=seed, retries=4, **options)
