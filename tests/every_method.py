"""One small run of every method, for faults that all of them meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_soo import KFAC, SOAP, Shampoo, SONew, TrustRegionNewtonCG

BLOCKS: dict[str, Any] = {
    "lr": 0.02,
    "precondition_frequency": 3,
    "start_preconditioning_step": 2,
    "refresh_delay": 2,
    "workers": "inline",
}
# roots are refreshed at steps 2, 3, 6, 9 and so on, and a refresh is in flight between a step and the next but one
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "shampoo": (Shampoo, BLOCKS),
    "soap": (SOAP, BLOCKS),
    "sonew": (SONew, {"lr": 0.02, "start_preconditioning_step": 2}),
    "kfac": (KFAC, {**BLOCKS, "damping": 0.01, "statistics_frequency": 1}),
    "trust_region": (TrustRegionNewtonCG, {"radius": 0.3, "max_cg_iterations": 8}),
}
BY_GRADIENT = [name for name in METHODS if name != "trust_region"]
every_method = pytest.mark.parametrize("method", METHODS)
every_method_by_gradient = pytest.mark.parametrize("method", BY_GRADIENT)

Change = Callable[[nn.Module, Tensor], Tensor]


def make(method: str, params: Any, **options: Any) -> Any:
    """An optimizer with the settings above."""
    kind, settings = METHODS[method]
    return kind(params, **{**settings, **options})


def small_net() -> nn.Module:
    """A convolution and a linear layer, 676 parameters."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10))


def batch(step: int) -> Tensor:
    return torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def values(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1).double() for parameter in net.parameters()])


class Run:
    """A model, its optimizer, and a loop over batches that depend on the step's number alone.

    Args:
        net: float64 unless given; the parameters of a new one are the same in every run.
        inputs: of a step.
        params: what the optimizer is built with; the model unless given.
    """

    def __init__(
        self,
        method: str,
        net: nn.Module | None = None,
        *,
        inputs: Callable[[int], Tensor] = batch,
        params: Any = None,
        **options: Any,
    ) -> None:
        self.method, self.inputs = method, inputs
        if net is None:
            torch.manual_seed(0)
            net = small_net().double()
        self.net = net
        self.optimizer = make(method, net if params is None else params, **options)
        if params is not None and method in ("kfac", "trust_region"):
            self.optimizer.attach(net)

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x).sin() - 0.3).square().mean()

    def step(
        self,
        number: int,
        *,
        change: Change | None = None,
        before: Callable[[], object] | None = None,
        parts: int = 1,
    ) -> Any:
        """One step.

        Args:
            change: of the loss.
            before: called between the backward pass and the step of a method that is given gradients.
            parts: micro-batches.
        """
        x = self.inputs(number)

        def loss_of(part: Tensor) -> Tensor:
            loss = self.loss(part)
            return loss if change is None else change(self.net, loss)

        if self.method == "trust_region":
            return self.optimizer.step([lambda part=part: loss_of(part) for part in x.chunk(parts)])
        self.optimizer.zero_grad()
        if self.method == "kfac":
            self.optimizer.accumulate(parts)
        for part in x.chunk(parts):
            (loss_of(part) / parts).backward()
        if before is not None:
            before()
        return self.optimizer.step()

    def steps(self, numbers: Iterable[int], **arguments: Any) -> Run:
        for number in numbers:
            self.step(number, **arguments)
        return self

    @property
    def values(self) -> Tensor:
        return values(self.net)


def spoiled(kind: str) -> Change:
    """Add zero to the loss, with a gradient that is NaN or infinite in one element of the first parameter."""

    def change(net: nn.Module, loss: Tensor) -> Tensor:
        element = next(net.parameters()).reshape(-1)[-1]
        zero = element - element.detach()
        # at zero the derivative of |x|^(1/2) is infinity times zero, that of x^(1/2) infinity
        return loss + (zero.abs() if kind == "nan" else zero).sqrt()

    return change
