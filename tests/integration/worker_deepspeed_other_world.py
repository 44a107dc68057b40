"""One rank of a world of 1, 2 or 3: trains an epoch more than the worlds that have saved before, and saves."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from accelerate_script import ADAMW, CLIP, leave, whole
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from other_world import (
    ACCUMULATE,
    ACROSS,
    CASES,
    EPOCHS,
    METHODS,
    MICRO_BATCH,
    ROWS,
    STEPS,
    WARMUP,
    Case,
    Model,
    after_epoch,
    make_rows,
)
from torch import nn

from lightning_soo import CheckpointError
from lightning_soo.integrations.deepspeed import initialize
from lightning_soo.integrations.deepspeed_other_world import load_engine_without_optimizer, saved_world_size
from lightning_soo.integrations.session import innermost

TAG, SCALE = "the_tag", 4.0
CLIENT = {"note": 0, "numbers": torch.ones(2)}
EARLIER = {2: (0,), 1: (2,), 3: (2, 1)}  # number of ranks -> of the worlds that it goes on from; 0 is from the start
EPOCHS_BEFORE = {0: 0, 2: 1, 1: 2}  # number of ranks -> epochs after which they save
Store = dict[str, dict[str, torch.Tensor]]


def build(case: Case, seed: int) -> Any:
    model = Model(seed)
    ranks = dist.get_world_size()
    engine, *_ = initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.groups(), **ADAMW),
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH // ranks,
            "gradient_accumulation_steps": ACCUMULATE,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": case.stage, **case.zero},
            "scheduler": {"type": "WarmupLR", "params": WARMUP},
            "soo": {"method": case.method, **METHODS[case.method]},
            **case.others,
        },
    )
    return engine


def run_epoch(engine: Any) -> list[float]:
    """Mean loss over ranks of every micro-batch."""
    x, y = make_rows()
    kind = next(engine.module.parameters()).dtype
    share = MICRO_BATCH // dist.get_world_size()
    losses = []
    for start in range(dist.get_rank() * share, ROWS, MICRO_BATCH):
        rows = slice(start, start + share)
        loss = nn.functional.mse_loss(engine(x[rows].to(kind)).float(), y[rows])
        engine.backward(loss)
        engine.step()
        value = loss.detach().clone()
        dist.all_reduce(value)
        losses.append(float(value) / dist.get_world_size())
    return losses


def members(engine: Any) -> Any:
    """Those that train."""
    return [member for member in innermost(engine.optimizer)._members if member.planned.spec.requires_grad]


def tensors(engine: Any, member: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's views of a parameter's masters and moments."""
    yield "parameter", member.parameter()
    for name, value in innermost(engine.optimizer).state[member.tensor].items():
        if name != "step":
            local = member.fragment.local(value)
            assert local.numel() == 0 or local.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            yield name, local


def expected_names(method: str) -> set[str]:
    moments = {"shampoo": {"exp_avg_sq", "momentum_buffer"}, "sonew": {"band_0", "band_1"}}[method]
    return {"parameter", "exp_avg", *moments}


def overwrite(engine: Any, store: Store) -> None:
    with torch.no_grad():
        for member in members(engine):
            for name, local in tensors(engine, member):
                fragment = member.fragment
                local.view(-1).copy_(store[fragment.name][name].view(-1)[fragment.start : fragment.stop])
    write_back = innermost(engine.optimizer)._layout.write_back
    assert (write_back is None) == (engine.zero_optimization_stage() == 0)
    if write_back is not None:
        write_back()
    for parameter in getattr(engine.optimizer, "persistent_parameters", ()):
        assert parameter.numel() == parameter.ds_numel  # kept whole between steps, as after a step


def collect(engine: Any) -> Store:
    """Whole masters and moments, on every rank."""
    mine = [
        (member.name, name, member.fragment.start, member.fragment.shape, local.detach().reshape(-1).clone())
        for member in members(engine)
        for name, local in tensors(engine, member)
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    store: Store = {}
    for piece in everyone:
        for parameter, name, start, shape, values in piece:
            found = store.setdefault(parameter, {}).setdefault(name, torch.full(shape, torch.nan))
            found.view(-1)[start : start + values.numel()] = values
    return store


def known_store(engine: Any, method: str) -> Store:
    """Values that bfloat16 has to round, other ones everywhere."""
    generator = torch.Generator().manual_seed(5)
    return {
        member.name: {
            name: torch.rand(member.fragment.shape, generator=generator) for name in sorted(expected_names(method))
        }
        for member in members(engine)
    }


def check_holds(engine: Any, case: Case, store: Store, *, seed: int) -> None:
    """Masters, moments and weights are the store's to the last bit, also in what the model computes.

    Args:
        seed: of the frozen parameter, of which no optimizer knows.
    """
    found = collect(engine)
    assert {name: set(value) for name, value in found.items()} == {name: expected_names(case.method) for name in store}
    for parameter, values in store.items():
        for name, value in values.items():
            assert torch.equal(found[parameter][name], value), (parameter, name)
    kind = torch.bfloat16 if case.is_half else torch.float32
    reference, x = Model(seed).to(kind), make_rows()[0].to(kind)
    with torch.no_grad():
        computed = engine(x)  # first: to gather weights makes stage 3 forget those that it had kept
        weights = whole(engine)
        for name, parameter in reference.named_parameters():
            expected = store[name]["parameter"].to(kind) if name in store else parameter
            assert torch.equal(weights[name], expected.float()), name
            parameter.copy_(weights[name])
        torch.testing.assert_close(computed, reference(x))
        engine(x)  # and keep them, as between the steps of training


def save(engine: Any, folder: Path) -> None:
    optimizer, rank = innermost(engine.optimizer), dist.get_rank()
    after_epoch(optimizer)
    if hasattr(engine.optimizer, "loss_scaler"):
        engine.optimizer.loss_scaler.cur_scale = SCALE
    optimizer.consolidate(to=None)
    store = collect(engine)
    engine.module.saved_by.fill_(rank)
    engine.save_checkpoint(str(folder), TAG, client_state={**CLIENT, "note": rank})
    if rank == 0:
        steps = {member.name: float(count(engine, member)) for member in members(engine)}
        torch.save({"store": store, "blocks": optimizer.blocks_state_dict(), "steps": steps}, folder / "store.pt")
    dist.barrier()


def count(engine: Any, member: Any) -> torch.Tensor:
    """The graft's steps, which several parameters in one flat tensor cannot keep in its state."""
    step: torch.Tensor = member.local_state(innermost(engine.optimizer).state[member.tensor])["step"]
    return step


def load(engine: Any, case: Case, folder: Path, ranks: int) -> None:
    """From a world of ``ranks``; everything is as it was there."""
    rank, optimizer, steps = dist.get_rank(), innermost(engine.optimizer), EPOCHS_BEFORE[ranks] * STEPS
    if case.stage == 0:  # nothing is divided
        assert saved_world_size(folder, TAG) is None
        engine.load_checkpoint(str(folder), TAG)
    else:
        assert saved_world_size(folder, TAG) == ranks
        path, client = load_engine_without_optimizer(engine, folder, TAG)
        assert path is not None and Path(path).is_file()
        theirs = rank if case.stage == 3 and rank < ranks else 0
        assert client["note"] == theirs and torch.equal(client["numbers"], torch.ones(2))
        assert "optimizer" not in client and float(engine.module.saved_by) == theirs
    assert (engine.global_steps, engine.global_samples) == (steps, steps * MICRO_BATCH * ACCUMULATE)
    assert engine.skipped_steps == 0 and engine.lr_scheduler.last_batch_iteration == steps - 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [ADAMW["weight_decay"], 0.5]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.01 + 0.01 * min(1.0, (steps - 1) / 6)] * 2)
    if hasattr(engine.optimizer, "loss_scaler"):
        assert engine.optimizer.loss_scale == SCALE
    saved = torch.load(folder / "store.pt", weights_only=True)
    if case.stage > 0:
        overwrite(engine, saved["store"])
        optimizer.load_blocks(saved["blocks"])
        for member in members(engine):
            count(engine, member).fill_(saved["steps"][member.name])
    check_holds(engine, case, saved["store"], seed=0)


def go_on(source: Case, case: Case, folder: Path, ranks: int) -> Any:
    """An engine by its own ``load_checkpoint``, from a world of ``ranks`` at perhaps another stage."""
    engine, rank, steps = build(case, 7), dist.get_rank(), EPOCHS_BEFORE[ranks] * STEPS
    run_epoch(engine)  # it is no fresh one
    path, client = engine.load_checkpoint(str(folder), TAG)
    assert Path(path) == folder / TAG / "second_order"
    theirs = rank if source.stage == 3 and rank < ranks else 0
    assert client["note"] == theirs and torch.equal(client["numbers"], torch.ones(2)) and set(client) == set(CLIENT)
    assert float(engine.module.saved_by) == 0
    assert (engine.global_steps, engine.global_samples) == (steps, steps * MICRO_BATCH * ACCUMULATE)
    assert engine.micro_steps == steps * ACCUMULATE and engine.skipped_steps == 0
    assert engine.lr_scheduler.last_batch_iteration == steps - 1
    if hasattr(engine.optimizer, "loss_scaler") and source.stage > 0:
        assert engine.optimizer.loss_scale == SCALE
    saved = torch.load(folder / "store.pt", weights_only=True)
    assert innermost(engine.optimizer).steps == saved["blocks"]["steps"]
    if source.is_half == case.is_half:
        check_holds(engine, case, saved["store"], seed=0)
    return engine


def objects_of_the_client(out: Path) -> None:
    """What is no plain data comes back at the stage at which it was saved, and not from our folder."""
    saved = build(CASES["zero-2"], 0)
    saved.save_checkpoint(str(out), TAG, client_state={"path": out})
    for name, words in (("zero-2", None), ("zero-3 partitioned", "load it at the stage that it was saved at")):
        engine = build(CASES[name], 7)
        before = collect(engine)
        if words is None:
            assert engine.load_checkpoint(str(out), TAG)[1]["path"] == out
        else:
            with pytest.raises(FileNotFoundError, match=words):
                engine.load_checkpoint(str(out), TAG)
        unchanged = torch.equal(collect(engine)["first.weight"]["parameter"], before["first.weight"]["parameter"])
        assert unchanged == (words is not None)
        engine.destroy()
    saved.destroy()


def damage(out: Path) -> None:
    """Refused on every rank, the model as it was; weights alone are taken, of any stage."""
    rank, sound = dist.get_rank(), out / "1" / "zero-1"
    bad = out / "bad"
    if rank == 0:
        shutil.copytree(sound, bad)
        file = next((bad / TAG / "second_order").glob("__0_*.distcp"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    dist.barrier()
    engine = build(CASES["zero-3"], 7)
    before = collect(engine)
    with pytest.raises(CheckpointError, match=r"damaged|cannot load this checkpoint"):
        engine.load_checkpoint(str(bad), TAG)
    after = collect(engine)
    assert all(torch.equal(after[name]["parameter"], before[name]["parameter"]) for name in before)
    assert engine.global_steps == 0
    for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
        engine.load_checkpoint(str(sound), TAG, **options)
        expected = torch.load(sound / "store.pt", weights_only=True)["store"]
        found = collect(engine)
        assert all(torch.equal(found[name]["parameter"], expected[name]["parameter"]) for name in expected)
        assert innermost(engine.optimizer).steps == 0
        assert engine.global_steps == (0 if "load_module_only" in options else 2 * STEPS)
    engine.destroy()


def refusals(out: Path) -> None:
    """DeepSpeed's own, which is why all of this is needed, and ours."""
    engine, folder = build(CASES["zero-2"], 7), out / "2" / "zero-2"
    with pytest.raises(ZeRORuntimeException, match="used a DP world size of 2 but the current world size is 1"):
        type(engine).load_checkpoint(engine, str(folder), TAG)
    with pytest.raises(FileNotFoundError, match="load it at the stage that it was saved at"):
        load_engine_without_optimizer(engine, out / "2" / "zero-3", TAG)
    with pytest.raises(FileNotFoundError, match="is it a checkpoint of ZeRO"):
        load_engine_without_optimizer(engine, out / "2" / "zero-0", TAG)
    optimizer = innermost(engine.optimizer)
    groups, optimizer.param_groups = optimizer.param_groups, optimizer.param_groups[:1]
    with pytest.raises(ValueError, match="saved with 2 parameter groups, the optimizer has 1"):
        load_engine_without_optimizer(engine, folder, TAG)
    optimizer.param_groups = groups
    engine.destroy()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    ranks = dist.get_world_size()
    found: dict[str, dict[int, Any]] = {name: {} for name in CASES}
    for name, case in CASES.items():
        for before in EARLIER[ranks]:
            seed = 7 if before else 0
            engine = build(case, seed)
            if before == EARLIER[ranks][0]:
                initial = collect(engine)
                for store in (known_store(engine, case.method), initial):
                    overwrite(engine, store)
                    check_holds(engine, case, store, seed=seed)
            if before:
                load(engine, case, out / str(before) / name, before)
            losses = []
            for epoch in range(EPOCHS_BEFORE[before], EPOCHS):
                losses += run_epoch(engine)
                if epoch + 1 == EPOCHS_BEFORE.get(ranks):
                    save(engine, out / str(ranks) / name)
                after_epoch(innermost(engine.optimizer))
            found[name][before] = whole(engine), losses
            engine.destroy()
    for source, before, name in ACROSS[ranks]:
        engine = go_on(CASES[source], CASES[name], out / str(before) / source, before)
        losses = []
        for _ in range(EPOCHS_BEFORE[before], EPOCHS):
            losses += run_epoch(engine)
            after_epoch(innermost(engine.optimizer))
        found[f"{source} -> {name}"] = {before: (whole(engine), losses)}
        engine.destroy()
    if ranks == 1:
        refusals(out)
        objects_of_the_client(out / "objects")
    if ranks == 3:
        damage(out)
    torch.save(found, out / f"found{ranks}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    leave()
