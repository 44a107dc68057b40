"""Faults of one rank alone, rows 12 to 17: what a rank of three sees of each."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
from engines import Ddp, Engine, Fsdp2, deviation, make_optimizer
from worker_layers import Branching, batch, options

from lightning_soo import KFAC, SOAP, Shampoo, TrustRegionNewtonCG
from lightning_soo.optim.takeover import METHODS
from lightning_soo.refresh.jobs import Job

RANKS = 3
Found = dict[str, Any]


def linear(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


def digest(tensors: Iterator[Tensor] | list[Tensor]) -> str:
    """Equal where all bits are."""
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def refusal(action: Callable[[], object]) -> list[str]:
    """What an action raises: the class and the text."""
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


# row 12


def no_gradient_on_some_ranks(rank: int) -> Found:
    """Rows of one rank without a gradient, and a module that does not run on one rank."""
    name = "second.0.weight"
    engine, alone, undisturbed = Fsdp2({}), Engine({}), Engine({})
    parameter, whole = (dict(each.module.named_parameters())[name] for each in (engine, alone))
    rows = parameter.to_local().shape[0]  # type: ignore[attr-defined]

    def lose(step: int) -> None:
        if step % 3 == 1 and rank == 0:
            parameter.grad = None

    def zero(step: int) -> None:
        if step % 3 == 1:
            whole.grad[:3] = 0.0  # type: ignore[index]

    engine.train(0, 12, rank, RANKS, before_step=lose)
    alone.train(0, 12, 0, 1, before_step=zero)
    undisturbed.train(0, 12, 0, 1)
    return {
        "rows": rows,
        "fsdp2": deviation(engine.parameters(), alone.parameters()),
        "effect": deviation(undisturbed.parameters(), alone.parameters()),
        "kfac": a_module_does_not_run_on_one_rank(rank),
    }


def a_module_does_not_run_on_one_rank(rank: int) -> float:
    """Under K-FAC it sends zeros, and its examples count."""
    model, alone = DistributedDataParallel(Branching(), find_unused_parameters=True), Branching()
    optimizers = [KFAC(model, **options()), KFAC(alone, **options())]
    optimizers[0].attach(model)
    optimizers[1].attach(alone, "single")
    through = [0, 2, 9, 10, 11]  # none of rank 1, whose examples are 4 to 7
    own = slice(4 * rank, 4 * rank + 4)
    for step in range(8):
        x, y = batch(step)
        here = [index - 4 * rank for index in through if index // 4 == rank]
        nn.functional.mse_loss(model(x[own], here), y[own]).backward()
        nn.functional.mse_loss(alone(x, through), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    return max(float((mine - expected).abs().max() / expected.abs().max()) for mine, expected in pairs)


# row 13


def another_configuration_on_one_rank(rank: int) -> Found:
    def attached(kind: Any, model: nn.Module | None = None, **given: Any) -> list[str]:
        return refusal(kind(model or linear(), **given).attach)

    odd = rank == 1
    return {
        "delay": attached(Shampoo, refresh_delay=2 if odd else 3),
        "nested": attached(Shampoo, workers={"kind": "thread", "deadline": 5 if odd else 6}),
        "interval": attached(Shampoo, precondition_frequency={"first": 5, "growth": 2 if odd else 3, "max": 40}),
        "override": attached(Shampoo, overrides=[{"match": "2.weight" if odd else "0.weight", "method": "none"}]),
        "group": attached(SOAP, lr=0.1 if odd else 0.2),
        "method": attached(SOAP if odd else Shampoo),
        "trust region": attached(TrustRegionNewtonCG, max_radius=5.0 if odd else 6.0),
    }


# row 14


def a_root_fails_on_one_rank(rank: int) -> Found:
    """The second root of one block: the rank that computes it gets NaN, once."""
    settings = {"refresh_delay": 2, "stagger": False, "start_preconditioning_step": 4}
    engine, alone, undisturbed = Ddp(settings), Engine(settings), Engine(settings)
    places = engine.optimizer._refresher.places  # type: ignore[union-attr]
    key = next(key for key, place in places.items() if place.refresher == 1)
    histories = {}
    for name, run, own, ranks in (("ddp", engine, rank, RANKS), ("alone", alone, 0, 1)):
        jobs = fail_second(run.optimizer, key)
        history = histories[name] = []
        for step in range(16):
            run.train(step, step + 1, own, ranks)
            block = run.optimizer._refresher.blocks[key]  # type: ignore[union-attr]
            history.append([digest(list(block.roots or [])), block.failures, run.optimizer.steps])
        assert len(jobs) == (4 if places[key].refresher == own or ranks == 1 else 0), jobs
    undisturbed.train(0, 16, 0, 1)
    return {
        "history": histories["ddp"],
        "failures alone": [failures for _, failures, _ in histories["alone"]],
        "parameters": digest(list(engine.parameters().values())),
        "error": deviation(engine.parameters(), alone.parameters()),
        "effect": deviation(undisturbed.parameters(), alone.parameters()),
    }


def fail_second(optimizer: Any, key: str) -> list[int]:
    """Give NaN to the second of a block's jobs, where this rank makes them; returns the steps of all."""
    made: list[int] = []
    original = optimizer._make_job

    def make(block: Any, statistics: Any) -> Any:
        job = original(block, statistics)
        if block.block.key == key:
            made.append(optimizer.steps)
            if len(made) == 2:
                assert isinstance(job, Job)
                return replace(job, function="rank_functions:roots_that_are_nan")
        return job

    optimizer._make_job = make
    return made


# row 15


def a_gradient_scaler_skips(rank: int) -> Found:
    """An overflow on one rank: as a run without a scaler that never saw the batch."""
    found = {}
    for method in METHODS:
        runs = {}
        for scaled in (True, False):
            model = DistributedDataParallel(linear().float())
            optimizer = make_optimizer(model, {"method": method})
            optimizer.attach(model)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
            if isinstance(optimizer, KFAC):
                optimizer.accumulate(1, scaler)
            for step in range(10):
                if step == 6 and not scaled:
                    continue
                x = torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + rank))
                loss = model(x).square().mean() * (float("inf") if step == 6 and rank == 1 else 1.0)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            runs[scaled] = {"bits": digest(model.parameters()), "scale": scaler.get_scale(), "steps": optimizer.steps}
        found[method] = {"scaled": runs[True], "plain": runs[False]}
    return found


# row 16


def shards_that_are_uneven_or_empty(rank: int) -> Found:
    """One block on three ranks, one of which holds no row of it; and a model with rows for some ranks alone."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    weight: Any = model[0].weight
    with torch.no_grad():
        weight.copy_(distribute_tensor(alone[0].weight, weight.device_mesh, [Shard(0)]))  # type: ignore[arg-type]
    optimizers = [make_optimizer(model, {}), make_optimizer(alone, {})]
    optimizers[1].attach(engine="single")
    for step in range(12):
        x = torch.randn(12, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for each in (model, alone):
            each(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    engine, whole = Fsdp2({}), Engine({})
    engine.train(0, 12, rank, RANKS)
    whole.train(0, 12, 0, 1)
    rows = {name: parameter.to_local().shape[0] for name, parameter in engine.module.named_parameters()}  # type: ignore[attr-defined]
    plan = optimizers[0]._plan
    assert plan is not None
    return {
        "elements": weight.to_local().numel(),
        "blocks": len(plan.units),
        "one block": float((weight.full_tensor() - alone[0].weight).abs().max()),
        "rows": {name: rows[name] for name in ("tokens.weight", "gain")},
        "model": deviation(engine.parameters(), whole.parameters()),
    }


# row 17


def a_slow_rank(rank: int) -> Found:
    found = {}
    for kind in (Ddp, Fsdp2):
        for slow in (False, True):
            engine = kind({"workers": "thread"})

            def sleep(step: int, slow: bool = slow) -> None:
                if slow and rank == 2 and step % 4 == 1:
                    time.sleep(0.2)

            engine.train(0, 12, rank, RANKS, before_step=sleep)
            engine.optimizer.close()
            found[f"{kind.name} {'slow' if slow else 'undisturbed'}"] = digest(list(engine.parameters().values()))
    return found
