"""One rank of the engine suite: a method on every engine named after it, against one process on the same batches."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from engines import Engine, Zero, deviation, every_engine, make_model, make_optimizer, reference
from launching import leave

from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.placement.plan import Plan
from lightning_soo.planning.traffic import INTERVAL, collectives_per_step, flows

# accumulation, clipping, refresh delay
CASES = ((1, None, 2), (2, None, 0), (1, 0.05, 0), (2, 0.05, 2))
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}
BFLOAT16_BOUND = 0.15  # of one rank's rounding against another's, in a run that moves by a third


def options_of(method: str, delay: int, kind: type[Engine]) -> dict[str, object]:
    """With and without delay; for SONew, which refreshes nothing, two chains and bands."""
    if method == "kfac":
        # where the engine steps group by group the bound is that of the step before, by design
        in_parts = issubclass(kind, Zero) and len(kind.groups(make_model(torch.float32))) > 1
        return {
            "method": method,
            "refresh_delay": delay,
            "stagger": delay > 0,
            "kl_clip": None if in_parts else 1e-2,
            "damping_method": "exact" if delay else "pi",
        }
    if method == "sonew":
        return {"method": method, "chain": "flat" if delay else "row", "bandwidth": 3 if delay else 1}
    if method == "soap-qr":
        return {"method": "soap", "refresh_delay": delay, "stagger": delay > 0, "basis": "qr"}
    return {"method": method, "refresh_delay": delay, "stagger": delay > 0}


@functools.cache
def expected(kind: type[Engine], method: str, clip: float | None, delay: int) -> dict[str, torch.Tensor]:
    return reference(kind, options_of(method, delay, kind), clip)


def compare(kind: type[Engine], method: str, rank: int, ranks: int) -> None:
    cases = {"shampoo": CASES, "soap-qr": CASES[2:3]}.get(method, (CASES[0], CASES[2], CASES[3]))
    for accumulation, clip, delay in cases:
        case = f"{method} {kind.name}, {ranks} ranks, accumulation {accumulation}, clip {clip}, delay {delay}"
        engine = kind(options_of(method, delay, kind), accumulation=accumulation, clip=clip)
        calls: list[dict[str, int]] = []

        sent: list[Counter[str]] = []

        def count(
            step: int, engine: Engine = engine, calls: list[dict[str, int]] = calls, sent: list[Counter[str]] = sent
        ) -> None:
            calls.append(counted(engine))
            sent.append(bytes_sent(engine))

        engine.train(0, 20, rank, ranks, before_step=count)
        count(20)
        check_planned(engine, sent, rank, case)
        # what one process does, in the same precision and parameter groups
        error = deviation(engine.parameters(), expected(kind, method, clip, delay))
        bound = BFLOAT16_BOUND if "bf16" in kind.name else BOUNDS[kind.precision(clip)]
        if engine.optimizer.options.basis == "qr" and kind.precision(clip) == torch.float32:
            bound = 1e-4  # rounding over the ridge is what a QR step makes of directions without statistics
        assert error <= bound, f"{case}: deviates by {error:.2g} of the movement"
        check_memory(engine, rank, case)
        check_collectives(engine, calls, case)
        engine.optimizer.close()
        if rank == 0:
            print(f"{case}: {error:.1e}", flush=True)


def counted(engine: Engine) -> dict[str, int]:
    """Collectives so far, of all ranks and of one copy of the model."""
    optimizer = engine.optimizer
    assert optimizer._assembly is not None
    transports = {id(t): t for t in (optimizer._transport, optimizer._assembly.transport)}.values()
    return {kind: sum(transport.calls[kind] for transport in transports) for kind in ("all_reduce", "all_to_all")}


def bytes_sent(engine: Engine) -> Counter[str]:
    """Bytes that this rank has given to others so far, by purpose."""
    optimizer = engine.optimizer
    if optimizer._assembly is None:
        return Counter()
    transports = {id(t): t for t in (optimizer._transport, optimizer._assembly.transport)}.values()
    return sum((Counter(transport.sent) for transport in transports), Counter())


def planner(engine: Engine) -> tuple[SecondOrderOptimizer, Plan] | None:
    """The same plan, by one process that has no process group and no numbers; None for layouts it does not know."""
    name, ranks = type(engine).name, dist.get_world_size()
    known = {**{f"zero-{stage}": f"zero{stage}" for stage in (1, 2, 3)}, "zero-3-sub-groups": "zero3"}
    known |= {"zero-2-one-group": "zero2", "zero-3-one-group": "zero3", "fsdp1-shard-grad-op": "fsdp1"}
    known |= {same: same for same in ("ddp", "fsdp1", "fsdp2", "hsdp")}
    if name not in known:
        return None
    how: dict[str, object] = {}
    if name == "hsdp":
        how["shard_size"] = ranks // 2
    if name == "zero-3-sub-groups":
        how["sub_group_size"] = 225
    if known[name] == "fsdp1":
        how["units"] = ["first", "second", "frozen"]
    with torch.device("meta"):
        model = make_model(engine.dtype)
    groups = engine.groups(model)
    optimizer = make_optimizer(model if groups is None else groups, engine.given)
    optimizer.remember(model)
    return optimizer, optimizer.plan_elsewhere(known[name], ranks, **how)


def check_planned(engine: Engine, sent: list[Counter[str]], rank: int, case: str) -> None:
    """The planner's table, plan and bytes are those of the run: over two intervals, when all roots are in."""
    found = planner(engine)
    if found is None:
        return
    optimizer, plan = found
    own = engine.optimizer._plan
    assert own is not None
    assert plan.table == own.table, case
    assert plan.units == own.units and plan.buckets == own.buckets, case
    assert [p.chain for p in plan.parameters] == [p.chain for p in own.parameters], case
    expected: Counter[str] = Counter()
    for flow in flows(optimizer, plan, without_gradient=("unused.weight", "unused.bias")):
        expected[flow.purpose] += int(flow.bytes[rank]) * (2 if flow.when == INTERVAL else 8)
    made = sent[20] - sent[12]
    assert made or len(plan.table.shard) == 1, case
    assert made == +expected, (case, rank, dict(made), dict(expected))
    optimizer.close()


def check_memory(engine: Engine, rank: int, case: str) -> None:
    """Bytes held are bytes planned, but for roots of the parameter that never had a gradient."""
    plan = engine.optimizer._plan
    assert plan is not None
    never = sum(
        u.root_bytes + u.moment_bytes for u in plan.units if u.block.parameter.startswith("unused") and rank in u.homes
    )
    assert engine.optimizer.state_bytes() + never == plan.state_bytes[rank], case
    held = [0] * plan.ranks
    dist.all_gather_object(held, engine.optimizer.state_bytes() + never)
    assert max(held) <= plan.state_balance * sum(held) / plan.ranks * (1 + 1e-9), case


def check_collectives(engine: Engine, calls: list[dict[str, int]], case: str) -> None:
    """In steps in which no root is started, sent or swapped: what the plan says, and no more.

    There are such steps where refreshes are not staggered, and that some were seen is part of the check.
    """
    plan, refresher = engine.optimizer._plan, engine.optimizer._refresher
    assert plan is not None and refresher is not None
    delay = engine.optimizer.options.refresh_delay or 0
    seen = 0
    for step in range(11, 20):
        quiet = not any(
            refresher.schedule.refreshes(key, step - past) for key in refresher.places for past in {0, delay, delay - 1}
        )
        if quiet:
            made = {kind: calls[step][kind] - calls[step - 1][kind] for kind in calls[0]}
            assert made == planned(engine), (case, step, made, planned(engine))
            seen += 1
    assert seen or engine.optimizer.options.stagger, case


def planned(engine: Engine) -> dict[str, int]:
    """Collectives of a step without refreshes."""
    optimizer = engine.optimizer
    assert optimizer._plan is not None
    return collectives_per_step(flows(optimizer, optimizer._plan, without_gradient=("unused.weight", "unused.bias")))


def main(method: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    engines = every_engine()
    for name in names:
        compare(engines[name], method, rank, ranks)
        if method == "soap":
            compare(engines[name], "soap-qr", rank, ranks)
    leave()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], sys.argv[2:])
