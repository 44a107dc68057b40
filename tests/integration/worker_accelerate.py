"""One of the ranks: the script's training with the opt-in by code, and a second-order optimizer of one's own."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate_script import ADAMW, Net, leave, make_data, train
from methods import refused
from torch import nn
from torch.utils.data import DataLoader

from lightning_soo.integrations import cpu
from lightning_soo.integrations.accelerate import prepare

if cpu.is_asked_for():
    cpu.train_on_cpu()

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from lightning_soo import KFAC, Shampoo


class Memory(GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory, main_process_only = "memory", False, True

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[Any, dict[str, float]]] = []

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: Any) -> None:
        pass

    def log(self, values: dict[str, float], step: Any = None, **_: Any) -> None:
        self.records.append((step, values))


def own(config: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """A second-order optimizer that the script builds itself."""
    options = {name: value for name, value in config.items() if name != "method"}
    if config["method"] == "kfac":  # what a taken-over AdamW becomes
        return KFAC(model, **{**ADAMW, "betas": (0.9, 0.999), "grafting": "adam", "momentum": 0.0, **options})
    return Shampoo(model, **ADAMW, **options)


def refusals(config: dict[str, Any]) -> None:
    """What must not pass silently."""
    accelerator = Accelerator()
    model = Net(0)
    adamw = torch.optim.AdamW(model.parameters())
    refused("SOO_CONFIG", lambda: prepare(Accelerator(), model, adamw))
    loader = DataLoader(make_data(), 2)
    misspelt = {"method": "shampoo", "precondition_freqency": 3}
    refused(
        "did you mean 'precondition_frequency'",
        lambda: prepare(accelerator, model, adamw, loader, config=misspelt),
    )
    twice = Shampoo(model)
    refused("opt in once", lambda: prepare(Accelerator(), model, twice, loader, config=config))
    if accelerator.distributed_type.value in ("MULTI_CPU", "NO"):
        prepared = prepare(accelerator, model, config=config)
        refused("no optimizer was taken over", lambda: accelerator.backward(prepared(torch.ones(2, 5)).sum()))
        refused("no optimizer was taken over", accelerator.end_training)
        os.environ["WORLD_SIZE"] = "5"
        refused("5 processes were started", lambda: prepare(Accelerator(), model, config=config))
        os.environ["WORLD_SIZE"] = str(accelerator.num_processes)
        lone = torch.optim.SGD([nn.Parameter(torch.ones(3, 3))], lr=0.1)
        other = Accelerator()
        wrapped = prepare(other, lone, config=config)
        if accelerator.num_processes > 1:
            refused("no prepared model holds", wrapped.step)


def monitored(config: dict[str, Any]) -> None:
    """Figures reach the trackers, the loaders' processes are counted, one after the other is enough."""
    accelerator = Accelerator(log_with=Memory())
    accelerator.init_trackers("runs")
    model = prepare(accelerator, Net(0), config={**config, "monitor": 3})
    optimizer = prepare(accelerator, torch.optim.AdamW(model.parameters(), **ADAMW), config={**config, "monitor": 3})
    loader = prepare(accelerator, DataLoader(make_data(), 2, num_workers=1), config={**config, "monitor": 3})
    for x, y in loader:
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.optimizer.data_workers == 1
    steps = len(loader)
    if accelerator.is_main_process:
        records = accelerator.get_tracker("memory").records
        assert [step for step, _ in records] == list(range(3, steps + 1, 3))
        assert records[-1][1]["second_order/condition_number"] > 1


def main(out: Path, configs: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for method, config in configs.items():
        by_code = functools.partial(prepare, config=config)
        found[method] = train(out / method, prepare=by_code)
        found[f"own {method}"] = train(out / method, build=functools.partial(own, config), prepare=prepare)
    refusals(configs["shampoo"])
    if Accelerator().distributed_type.value in ("MULTI_CPU", "NO"):
        monitored(configs["shampoo"])
    torch.save(found, out / f"code{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    leave()
