"""One rank: torch's own functions for sharded and whole optimizer states, with preconditioners in them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from engines import Ddp, Engine, Fsdp1, Fsdp2, deviation
from launching import run_cases
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

OPTIONS = {"method": "shampoo", "refresh_delay": 3, "stagger": True}
SAVED, LAST = 8, 14


def goes_on(kind: type[Engine], rank: int, **options: bool) -> None:
    ranks, chosen = dist.get_world_size(), StateDictOptions(**options)
    engine = kind(OPTIONS)
    engine.train(0, SAVED, rank, ranks)
    engine.optimizer.consolidate(to=None)
    weights = get_model_state_dict(engine.model, options=chosen)
    state = get_optimizer_state_dict(engine.model, engine.optimizer, options=chosen)
    copied = {name: value.clone() for name, value in weights.items()}
    moments = {
        name: {field: one.clone() if isinstance(one, torch.Tensor) else one for field, one in row.items()}
        for name, row in state["state"].items()
    }
    state = {"state": moments, "param_groups": copy_of(state["param_groups"])}
    engine.train(SAVED, LAST, rank, ranks)
    other = kind(OPTIONS)
    other.train(0, 2, rank, ranks)
    set_model_state_dict(other.model, copied, options=chosen)
    set_optimizer_state_dict(other.model, other.optimizer, state, options=chosen)
    other.train(SAVED, LAST, rank, ranks)
    assert deviation(other.parameters(), engine.parameters()) <= 1e-12, (kind.name, options)


def copy_of(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: copy_of(inner) for name, inner in value.items()}
    return [copy_of(inner) for inner in value] if isinstance(value, list) else value


def replicated(rank: int) -> None:
    goes_on(Ddp, rank)


def sharded_by_rows(rank: int) -> None:
    goes_on(Fsdp2, rank)
    goes_on(Fsdp2, rank, full_state_dict=True)


def sharded_flat(rank: int) -> None:
    goes_on(Fsdp1, rank)


def without_preconditioners_it_is_refused(rank: int) -> None:
    """Where nobody has gathered them: not silently."""
    ranks = dist.get_world_size()
    engine = Fsdp2(OPTIONS)
    engine.train(0, SAVED, rank, ranks)
    state = get_optimizer_state_dict(engine.model, engine.optimizer)
    other = Fsdp2(OPTIONS)
    set_optimizer_state_dict(other.model, other.optimizer, state)
    try:
        other.train(SAVED, LAST, rank, ranks)
    except RuntimeError as error:
        assert "preconditioners were not" in str(error)
    else:
        raise AssertionError("it went on")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_cases([replicated, sharded_by_rows, sharded_flat, without_preconditioners_it_is_refused])
