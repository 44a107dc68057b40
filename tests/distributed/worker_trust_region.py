"""One rank: trust-region Newton-CG on every engine named, against one process on the same batches."""

from __future__ import annotations

import copy
import sys
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from engines import Engine, deviation, every_engine, make_batch
from launching import leave
from torch import Tensor, nn

from lightning_soo import TrustRegionNewtonCG
from lightning_soo.transport import AgreementError

STEPS = 8
CASES: dict[str, dict[str, Any]] = {
    "hessian": {"radius": 0.5, "retries": 3},
    "sub-sampled, scipy": {"radius": 2.0, "preset": "scipy", "hessian_fraction": 0.25, "retries": 1},
    "gauss-newton, diagonal": {
        "radius": 0.5,
        "curvature": "gauss_newton",
        "preconditioner": "diagonal",
        "weight_decay": 0.01,
    },
}
MICRO_BATCHES = {"hessian": 1, "sub-sampled, scipy": 2, "gauss-newton, diagonal": 3}


def trust_region(kind: type[Engine]) -> type[Engine]:
    """An engine whose optimizer is ours."""

    class Trusted(kind):  # type: ignore[misc, valid-type]
        def build(self, options: dict[str, Any]) -> Any:
            optimizer = TrustRegionNewtonCG(self.model, max_cg_iterations=8, **options)
            optimizer.attach(self.model, "single" if kind is Engine else None)
            return optimizer

        def loss_and_outputs(self, batch: tuple[Tensor, Tensor]) -> Any:
            outputs = self.model(batch[0])
            return nn.functional.cross_entropy(outputs, batch[1]), outputs

        def take_steps(self, case: str, first: int, last: int, rank: int, ranks: int) -> None:
            for step in range(first, last):
                inputs, targets = make_batch(step, 48)
                own = slice(rank * 48 // ranks, (rank + 1) * 48 // ranks)
                before = self.optimizer.steps
                calls = counted(self.optimizer)
                self.optimizer.step_on(self.loss_and_outputs, (inputs[own], targets[own]), MICRO_BATCHES[case])
                if self.optimizer.steps == before + 1 and ranks > 1:
                    self.check_collectives(calls)

        def check_collectives(self, before: tuple[int, int]) -> None:
            """One reduction for each product with the curvature, and one vector there and back where it is sharded."""
            products = self.optimizer.last.cg_iterations
            reductions, exchanges = (new - old for new, old in zip(counted(self.optimizer), before, strict=True))
            space = self.optimizer._space
            fixed = 3 if space._in_copy.size == 1 else 12
            vectors = products if space._across.size > 1 else 0
            scalars = products if space._in_copy.size > 1 else 0
            assert vectors + scalars <= reductions <= vectors + scalars + fixed, (reductions, products)
            assert exchanges == (0 if space._in_copy.size == 1 else 2 * products + 2), (exchanges, products)

    Trusted.__name__ = kind.__name__
    return Trusted


def counted(optimizer: TrustRegionNewtonCG) -> tuple[int, int]:
    """Reductions and exchanges so far, over all the groups of ranks that vectors are shared between."""
    space = optimizer._space
    seen = {id(one): one for one in (optimizer._transport, space._in_copy, space._across)}
    return tuple(sum(one.calls[name] for one in seen.values()) for name in ("all_reduce", "all_to_all"))  # type: ignore[return-value]


def compare(name: str, kind: type[Engine], rank: int, ranks: int) -> None:
    for case, options in CASES.items():
        alone = trust_region(Engine)(options)
        alone.take_steps(case, 0, STEPS, 0, 1)
        engine = trust_region(kind)(options)
        engine.take_steps(case, 0, STEPS // 2, rank, ranks)
        saved = copy.deepcopy(engine.optimizer.state_dict())
        middle = {key: value.clone() for key, value in engine.parameters().items()}
        engine.take_steps(case, STEPS // 2, STEPS, rank, ranks)
        after, expected = engine.parameters(), alone.parameters()
        label = f"{case}, {name}, {ranks} ranks"
        found = deviation(after, expected)
        assert found < 1e-9, f"{label}: {found}"
        assert alone.optimizer.param_groups[0]["accepted"] >= STEPS // 2, f"{label}: it has hardly moved"
        assert engine.optimizer.radius == alone.optimizer.radius, label
        assert engine.optimizer.propagations == alone.optimizer.propagations, label
        assert torch.is_grad_enabled()
        resumed = trust_region(kind)({**options, "radius": 1.5})
        load(resumed, middle)
        resumed.optimizer.load_state_dict(saved)
        resumed.take_steps(case, STEPS // 2, STEPS, rank, ranks)
        again = resumed.parameters()
        for key in after:
            assert torch.equal(after[key], again[key]), f"{label}: {key} differs after a resume"
        assert resumed.optimizer.propagations == engine.optimizer.propagations
        if rank == 0:
            print(label, found, flush=True)


def load(engine: Engine, values: dict[str, Tensor]) -> None:
    """Give an engine whole parameters."""
    from lightning_soo.placement.fragments import canonical_name

    if any(type(module).__name__ == "FullyShardedDataParallel" for module in engine.model.modules()):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(engine.model, writeback=True), torch.no_grad():
            for key, parameter in engine.model.named_parameters():
                parameter.copy_(values[canonical_name(key)])
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for key, parameter in engine.module.named_parameters():
            value = values[canonical_name(key)]
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def refuse_zero(kind: type[Engine]) -> None:
    engine = kind({})
    optimizer = TrustRegionNewtonCG(engine.module)
    try:
        optimizer.attach(engine.engine)  # type: ignore[attr-defined]
    except TypeError as error:
        assert f"cannot train under DeepSpeed's {kind.name}" in str(error), error
    else:
        raise AssertionError(f"{kind.name} was not refused")


def refuse_difference(rank: int) -> None:
    """Ranks that differ, on every rank."""
    engine = trust_region(Engine)({"radius": 1.0})
    other = TrustRegionNewtonCG(engine.module, hessian_fraction=0.5 - 0.1 * rank)
    try:
        other.attach(engine.module)
    except AgreementError as error:
        assert "the configuration of rank" in str(error)
    else:
        raise AssertionError("ranks that differ were not refused")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    engines = every_engine()
    for name in sys.argv[1:]:
        if name.startswith("zero"):
            refuse_zero(engines[name])
        else:
            compare(name, engines[name], rank, ranks)
    if ranks > 1:
        refuse_difference(rank)
    leave()


if __name__ == "__main__":
    main()
