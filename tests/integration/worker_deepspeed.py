"""One of two ranks of DeepSpeed's launcher: every stage and method, saved and resumed, and partial checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import traceback
from base64 import urlsafe_b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate_script import ACCUMULATE, ADAMW, CLIP, EPOCHS, MICRO_BATCH, ROWS, Net, leave, make_data, whole
from methods import refused
from torch import nn

from lightning_soo import Shampoo
from lightning_soo.integrations.deepspeed import initialize
from lightning_soo.integrations.session import innermost

WARMUP: dict[str, Any] = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.02, "warmup_num_steps": 6, "warmup_type": "linear"}
JSON_OPTIMIZER = {"type": "AdamW", "params": ADAMW}


def settings(stage: int, **others: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH // 2,
        "gradient_accumulation_steps": ACCUMULATE,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        **others,
    }


def run_engine(engine: Any, first: int = 0, last: int = EPOCHS) -> list[float]:
    """Mean loss over ranks of every micro-batch of some epochs."""
    x, y = make_data().tensors
    kind = next(engine.module.parameters()).dtype
    losses, share, rank = [], MICRO_BATCH // 2, dist.get_rank()
    for _ in range(first, last):
        for start in range(rank * share, ROWS, MICRO_BATCH):
            rows = slice(start, start + share)
            loss = nn.functional.mse_loss(engine(x[rows].to(kind)).float(), y[rows])
            engine.backward(loss)
            engine.step()
            value = loss.detach().clone()
            dist.all_reduce(value)
            losses.append(float(value) / 2)
    return losses


def forms(out: Path, config: dict[str, Any]) -> dict[str, Callable[[nn.Module], Any]]:
    """Ways to say the same to DeepSpeed."""
    file = out / "ds_config.json"
    with_optimizer = {**config, "optimizer": JSON_OPTIMIZER}
    if dist.get_rank() == 0:
        file.write_text(json.dumps(with_optimizer))
    dist.barrier()
    plain = {key: value for key, value in config.items() if key != "soo"}
    encoded = urlsafe_b64encode(json.dumps(with_optimizer).encode()).decode()
    arguments = argparse.Namespace(deepspeed_config=str(file), local_rank=int(os.environ["LOCAL_RANK"]))

    def from_arguments(model: nn.Module) -> Any:
        returned = initialize(arguments, model, model_parameters=model.parameters())
        assert arguments.deepspeed_config == str(file)
        return returned

    def from_object(model: nn.Module) -> Any:
        before = json.dumps(config)
        adamw = torch.optim.AdamW(model.parameters(), **ADAMW)
        returned = initialize(model=model, optimizer=adamw, config=config)
        assert innermost(returned[1]) is adamw and json.dumps(config) == before
        return returned

    return {
        "a dictionary": lambda model: initialize(model=model, config=with_optimizer),
        "a file": lambda model: initialize(model=model, config=str(file)),
        "arguments": from_arguments,
        "base64": lambda model: initialize(model=model, config=encoded),
        "an object": from_object,
        "a function": lambda model: initialize(
            model=model, optimizer=lambda parameters: torch.optim.AdamW(parameters, **ADAMW), config_params=config
        ),
        "an argument": lambda model: initialize(
            model=model, config={**plain, "optimizer": JSON_OPTIMIZER}, soo=config["soo"]
        ),
        "the environment": lambda model: from_environment(model, {**plain, "optimizer": JSON_OPTIMIZER}, config["soo"]),
    }


def from_environment(model: nn.Module, config: dict[str, Any], second_order: dict[str, Any]) -> Any:
    os.environ["SOO_CONFIG"] = json.dumps(second_order)
    try:
        return initialize(model=model, config=config)
    finally:
        del os.environ["SOO_CONFIG"]


def train(build: Callable[[nn.Module], Any], folder: Path) -> dict[str, Any]:
    """Losses and whole parameters of all epochs, saved after one, and of another engine that goes on from there."""
    engine, *_ = build(Net(0))
    losses = run_engine(engine, last=1)
    engine.save_checkpoint(str(folder))
    losses += run_engine(engine, first=1)
    found = {"whole": (whole(engine), losses)}
    engine.destroy()
    again, *_ = build(Net(7))
    again.load_checkpoint(str(folder))
    losses = run_engine(again, first=1)
    found["resumed"] = (whole(again), losses)
    again.destroy()
    return found


def partial_loads(build: Callable[[nn.Module], Any], folder: Path) -> None:
    """Weights alone start anew; moments without preconditioners are refused."""
    for options in ({"load_optimizer_states": False}, {"load_module_only": True}):
        engine, *_ = build(Net(7))
        engine.load_checkpoint(str(folder), **options)
        optimizer = innermost(engine.optimizer)
        assert optimizer.steps == 0
        run_engine(engine, last=1)
        assert optimizer.steps == ROWS // MICRO_BATCH // ACCUMULATE
        engine.destroy()
    if dist.get_rank() == 0:
        for ours in folder.glob("*/second_order"):
            shutil.rmtree(ours)
    dist.barrier()
    engine, *_ = build(Net(7))
    engine.load_checkpoint(str(folder))
    refused("its preconditioners were not", lambda: run_engine(engine, last=1))
    engine.destroy()


def own_optimizer(config: dict[str, Any]) -> dict[str, Any]:
    """A second-order optimizer that the script builds itself is attached; its threads end with the engine."""
    model = Net(0)
    options = {name: value for name, value in config["soo"].items() if name != "method"}
    optimizer = Shampoo(model, **ADAMW, **options, workers={"kind": "thread", "count": 1})
    engine, *_ = initialize(
        model=model, optimizer=optimizer, config={key: value for key, value in config.items() if key != "soo"}
    )
    losses = run_engine(engine)
    found = {"whole": (whole(engine), losses)}
    running = [thread for thread in threading.enumerate() if thread.name.startswith("lightning_soo")]
    assert len(running) == 1
    engine.destroy()
    running[0].join(10)
    assert not running[0].is_alive()
    return found


def defaults(config: dict[str, Any]) -> None:
    """DeepSpeed's own loader, whose processes are counted, and its own clipping."""
    del config["gradient_clipping"]
    engine, *_ = initialize(model=Net(0), training_data=make_data(), config=config)
    run_engine(engine, last=1)
    workers = engine.training_dataloader.num_local_io_workers
    assert innermost(engine.optimizer).data_workers == workers > 0
    engine.destroy()


def main(out: Path, configs: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    assert dist.get_world_size() == 2
    found: dict[str, Any] = {}
    ways = iter(["a dictionary", "a file", "arguments", "base64", "an object", "a function"])
    for stage in (1, 2, 3):
        for method, config in configs.items():
            way, name = next(ways), f"zero-{stage} {method}"
            build = forms(out, settings(stage, soo=config))[way]
            found[name] = train(build, out / name)
            if method == "shampoo":
                partial_loads(build, out / name)
    for (method, config), way in zip(configs.items(), ("an argument", "the environment"), strict=True):
        build = forms(out, settings(0, soo=config))[way]
        found[f"zero-0 {method}"] = train(build, out / f"zero-0 {method}")
    offloaded = settings(2, soo=configs["shampoo"])
    offloaded["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    found["offloaded shampoo"] = train(forms(out, offloaded)["an object"], out / "offloaded")
    found["own shampoo"] = own_optimizer(settings(1, soo=configs["shampoo"]))
    monitor = {"enabled": True, "output_path": str(out), "job_name": "figures"}
    half = settings(1, soo={**configs["shampoo"], "monitor": 3}, bf16={"enabled": True}, csv_monitor=monitor)
    found["bf16 shampoo"] = train(forms(out, half)["a dictionary"], out / "bf16")
    defaults(settings(2, soo=configs["shampoo"], optimizer=JSON_OPTIMIZER))
    torch.save(found, out / f"rank{dist.get_rank()}.pt")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[2]), json.loads(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    leave()
