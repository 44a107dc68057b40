"""One rank of three: what goes wrong on one rank alone is told to all, and nobody hangs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from engines import make_optimizer
from launching import run_cases
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_soo import AgreementError
from lightning_soo.optim import plannable
from lightning_soo.placement.plan import Plan


def raised(action: Callable[[], object]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def sharded(module: nn.Module) -> nn.Module:
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return module


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=False))


def an_adapter_fails_on_one_rank(rank: int) -> None:
    model = sharded(small())
    optimizer = make_optimizer(model, {})
    original = plannable.read_layout

    def failing(*arguments: Any) -> Any:
        if rank == 1:
            raise TypeError("parameter '0.weight': of a kind that only this rank has")
        return original(*arguments)

    plannable.read_layout = failing
    error = raised(lambda: optimizer.attach(model))
    plannable.read_layout = original
    assert isinstance(error, TypeError if rank == 1 else AgreementError), error
    assert "only this rank has" in str(error) if rank == 1 else "rank [1]" in str(error)


def a_plan_differs_on_one_rank(rank: int) -> None:
    model = sharded(nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6)))
    optimizer = make_optimizer(model, {})
    original = plannable.build_plan

    def differing(*arguments: Any, **options: Any) -> Plan:
        plan = original(*arguments, **options)
        return replace(plan, parameters=plan.parameters[::-1]) if rank == 2 else plan

    plannable.build_plan = differing
    error = raised(lambda: optimizer.attach(model))
    plannable.build_plan = original
    assert isinstance(error, AgreementError) and "the plan of rank [2]" in str(error), error


def a_piece_is_missing(rank: int) -> None:
    """An adapter that loses elements is found out before anything is sent."""
    model = sharded(small())
    optimizer = make_optimizer(model, {})
    original = plannable.read_layout

    def losing(*arguments: Any) -> Any:
        layout = original(*arguments)
        if rank != 1:
            return layout
        first = layout.fragments[0]
        return replace(layout, fragments=(replace(first, stop=first.start), *layout.fragments[1:]))

    plannable.read_layout = losing
    error = raised(lambda: optimizer.attach(model))
    plannable.read_layout = original
    assert isinstance(error, ValueError) and "'0.weight'" in str(error), error


def rank_deficient_statistics(rank: int) -> None:
    """Six examples for blocks of order 24: as far from one process as that is from itself in another order of sums."""

    def run(model: nn.Module, order: list[int], engine: str | None) -> torch.Tensor:
        optimizer = make_optimizer(model, {"max_preconditioner_dim": 24, "preconditioner_eps": 1e-6})
        optimizer.attach(model, engine)
        for step in range(16):
            x = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))[order]
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weight = model[0].weight  # type: ignore[index]
        return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach()  # type: ignore[operator, union-attr, return-value]

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))

    everything = list(range(6))
    alone = run(fresh(), everything, "single")
    orders = [everything[::-1], everything[3:] + everything[:3], everything[::2] + everything[1::2]]
    floor = max(float((run(fresh(), order, "single") - alone).abs().max()) for order in orders)
    own = everything[2 * rank : 2 * rank + 2]
    error = float((run(sharded(fresh()), own, None) - alone).abs().max())
    assert 0 < floor < 0.1 and error <= 3 * floor, (error, floor)


def a_block_that_a_gradient_reaches_late(rank: int) -> None:
    """Half of a parameter has gradients from the sixth step on alone; blocks end where no shard does."""

    def run(module: nn.Module, engine: str | None, late: bool, **given: object) -> torch.Tensor:
        optimizer = make_optimizer(module, {"max_preconditioner_dim": 8, "stagger": False, **given})
        optimizer.attach(module, engine)
        weight = module[0].weight  # type: ignore[index]
        for step in range(12):
            gradient = torch.randn(21, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            if late and step < 6:
                gradient[11:] = 0.0
            split = engine is None
            weight.grad = distribute_tensor(gradient, weight.device_mesh, weight.placements) if split else gradient
            optimizer.step()
        return (weight.full_tensor() if engine is None else weight).detach()  # type: ignore[no-any-return]

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 21, bias=False)).double()

    for given in ({}, {"grafting_norm": "block"}, {"grafting": None}):
        settings = {"precondition_frequency": 5, "refresh_delay": 0, "start_preconditioning_step": 5, **given}
        found = run(sharded(fresh()), None, True, **settings)
        alone, never = (run(fresh(), "single", late, **settings) for late in (True, False))
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)
        assert float((alone - never).abs().max()) > 1e-3


def results_in_flight_outlive_the_workers(rank: int) -> None:
    """After ``close()``, as Lightning calls it at the end, a consolidated state has the roots that were under way."""
    model = sharded(nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(4))))
    optimizer = make_optimizer(model, {"max_preconditioner_dim": 24, "stagger": False})
    for step in range(6):
        model(torch.randn(6, 24, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = []
    for _ in range(2):
        optimizer.consolidate(0)
        if rank == 0:
            rows = optimizer.blocks_state_dict()["in_flight"]
            assert len(rows) == 8 and all(row["outcome"]["ok"] for row in rows)  # of steps 3 and 4
            found.append({(row["key"], row["started"]): row["outcome"]["roots"] for row in rows})
        optimizer.close()
    if rank == 0:
        torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=0.0)


def well_blocked_is_without_traffic(rank: int) -> None:
    """Rows divide evenly and blocks end where shards end: three small reductions per step, nothing else.

    Flags, norms, and in steps that update statistics (here all) what gradients have in common.
    """
    model = sharded(nn.Sequential(nn.Linear(8, 24, bias=False), nn.Tanh(), nn.Linear(24, 24, bias=False)).double())
    optimizer = make_optimizer(model, {"precondition_frequency": 5, "refresh_delay": 1, "stagger": False})
    calls = []
    for step in range(12):
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        before = dict(optimizer._transport.calls)
        optimizer.step()
        calls.append({name: count - before.get(name, 0) for name, count in optimizer._transport.calls.items()})
        optimizer.zero_grad()
    plan = optimizer._plan
    assert plan is not None and plan.exchange_bytes == 0 and not any(unit.place.travels for unit in plan.units)
    assert {name: count for name, count in calls[7].items() if count} == {"all_reduce": 3}, calls


def what_is_not_supported_is_named(rank: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.randn(6, 6), mesh, [Shard(1)]))
    error = raised(lambda: make_optimizer([("attention.weight", weight)], {}).attach())
    assert isinstance(error, TypeError) and "'attention.weight'" in str(error) and "Shard(dim=1)" in str(error), error
    replicated = nn.Parameter(distribute_tensor(torch.randn(6, 6), mesh, [Replicate()]))
    plan = make_optimizer([("attention.weight", replicated)], {}).attach()
    assert plan.is_replicated
    flat = make_optimizer(small(), {})
    flat.param_groups[0]["params"] = [torch.zeros(16)]
    error = raised(flat.attach)
    assert isinstance(error, TypeError) and "flat tensor of 16 elements" in str(error), error


if __name__ == "__main__":
    run_cases(
        [
            an_adapter_fails_on_one_rank,
            a_plan_differs_on_one_rank,
            a_piece_is_missing,
            rank_deficient_statistics,
            a_block_that_a_gradient_reaches_late,
            results_in_flight_outlive_the_workers,
            well_blocked_is_without_traffic,
            what_is_not_supported_is_named,
        ]
    )
