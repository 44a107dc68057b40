"""One rank of three: a gradient that is not finite on one rank alone is told to all, under several engines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from engines import Ddp, Engine, Fsdp1Flat, Zero2, deviation
from every_method import Run, small_net, spoiled
from launching import run_cases
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_soo import TrustRegionNewtonCG

RANK, STEP = 2, 5


def spoil_gradient(engine: Engine, rank: int) -> Callable[[int], None]:
    """Between the backward pass and the step, one element of this rank's first gradient."""

    def before_step(step: int) -> None:
        if step == STEP and rank == RANK:
            parameter = next(p for p in engine.model.parameters() if p.grad is not None and p.numel())
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = float("nan")

    return before_step


def compare(engine: Engine, kind: type[Engine], options: dict[str, Any], rank: int, bound: float, **given: Any) -> None:
    """With one process that has never seen the batch."""
    engine.train(0, 12, rank, dist.get_world_size(), **given)
    alone = type("Reference", (Engine,), {"precision": kind.precision, "groups": kind.groups})(options)
    alone.train(0, STEP, 0, 1)
    alone.train(STEP + 1, 12, 0, 1)
    skipped = engine.engine.skipped_steps if isinstance(engine, Zero2) else 0  # DeepSpeed looks, too
    assert engine.optimizer.skipped_steps + skipped == 1
    error = deviation(engine.parameters(), alone.parameters())
    assert error <= bound, (kind.name, error)


def shampoo_under_fsdp1(rank: int) -> None:
    engine = Fsdp1Flat({})
    compare(engine, Fsdp1Flat, {}, rank, 1e-9, before_step=spoil_gradient(engine, rank))


def kfac_under_ddp(rank: int) -> None:
    """And nobody's factors have seen it."""
    engine = Ddp({"method": "kfac"})
    compare(engine, Ddp, {"method": "kfac"}, rank, 1e-9, before_step=spoil_gradient(engine, rank))


def shampoo_under_zero(rank: int) -> None:
    """The engine adds up gradients, and the element is on the rank that owns it."""
    engine = Zero2({})
    original, steps = engine.loss, iter(range(12))

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        found = original(batch)
        return spoiled("nan")(engine.module, found) if next(steps) == STEP and rank == RANK else found

    engine.loss = loss  # type: ignore[method-assign]
    compare(engine, Zero2, {}, rank, 1e-5)


def trust_region_under_ddp(rank: int) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(small_net().double())
    optimizer = TrustRegionNewtonCG(model, radius=0.3, max_cg_iterations=8)
    optimizer.attach(model)
    torch.manual_seed(0)
    alone = Run("trust_region", small_net().double())
    alone.optimizer.attach(alone.net, "single")
    for step in range(8):
        own = alone.inputs(step)[4 * rank : 4 * rank + 4]

        def closure(own: Tensor = own, step: int = step) -> Tensor:
            loss = (model(own).sin() - 0.3).square().mean()
            return spoiled("inf")(model, loss) if step == STEP and rank == RANK else loss

        optimizer.step(closure)
        if step != STEP:
            alone.step(step)
    assert optimizer.skipped_steps == 1
    for mine, expected in zip(model.parameters(), alone.net.parameters(), strict=True):
        assert (mine - expected).abs().max() <= 1e-9


if __name__ == "__main__":
    cases = [shampoo_under_fsdp1, kfac_under_ddp, trust_region_under_ddp]
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        pass
    else:
        cases.append(shampoo_under_zero)
    run_cases(cases)
