"""Fabric under one strategy, within a world that others started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader

from lightning_soo import KFAC, Shampoo
from lightning_soo.strategies.fabric import (
    FabricSecondOrderDDPStrategy,
    FabricSecondOrderDeepSpeedStrategy,
    FabricSecondOrderFSDP2Strategy,
    FabricSecondOrderFSDPStrategy,
)

CLIP = 0.1


class Scaled(nn.Module):
    """The parameters of the Lightning module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * self.scale


def make_strategy(engine: str, **options: Any) -> Any:
    options = {"method": None, **options}
    if engine == "ddp":
        return FabricSecondOrderDDPStrategy(**options)
    if engine == "fsdp":
        return FabricSecondOrderFSDPStrategy(**options)
    if engine in ("fsdp2", "hsdp"):
        return FabricSecondOrderFSDP2Strategy(replicate_size=2 if engine == "hsdp" else 1, **options)
    strategy = FabricSecondOrderDeepSpeedStrategy(stage=int(engine[-1]), **options)
    strategy.config["gradient_clipping"] = CLIP
    return strategy


def train(
    worker: Any,
    strategy: Any,
    epochs: range,
    load: Path | None = None,
    save: Path | None = None,
    loads: tuple[str, ...] = ("model", "optimizer"),
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Whole parameters by name after the epochs; what was loaded before them and saved after them."""
    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=strategy, **options)
    fabric.launch()
    torch.manual_seed(fabric.global_rank)
    module = Scaled(worker.Net())
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), **worker.ADAMW))
    loader = fabric.setup_dataloaders(DataLoader(worker.make_data(), worker.GLOBAL_BATCH // fabric.world_size))
    state = {"model": model, "optimizer": optimizer}
    if load is not None:
        fabric.load(load, {name: state[name] for name in loads})
    for _ in epochs:
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x).to(y.dtype), y)
            fabric.backward(loss)
            if not isinstance(strategy, FabricSecondOrderDeepSpeedStrategy):
                fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()
    if save is not None:
        fabric.save(save, state)
        fabric.barrier()
    strategy.close_optimizers()
    return weights(strategy, model._forward_module, module)


def weights(strategy: Any, wrapped: nn.Module, module: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(strategy, FabricSecondOrderFSDP2Strategy):
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    if isinstance(strategy, FabricSecondOrderFSDPStrategy):
        with FullyShardedDataParallel.summon_full_params(wrapped):
            return {name: value.detach().clone() for name, value in module.state_dict().items()}
    if isinstance(strategy, FabricSecondOrderDeepSpeedStrategy):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            return {name: value.detach().float().clone() for name, value in module.named_parameters()}
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def main(worker: Any, engine: str, out: Path) -> dict[str, Any]:
    """What the test compares: one run in float32 and one in bfloat16. Resuming is compared here."""
    results = {"32-true": train(worker, make_strategy(engine), range(2))}
    results["bf16-mixed"] = train(worker, make_strategy(engine), range(2), precision="bf16-mixed")
    kinds: list[dict[str, Any]] = [{"state_dict_type": "full"}, {"state_dict_type": "sharded"}]
    for number, kind in enumerate(kinds if engine == "fsdp" else [{}]):
        path = out / f"fabric{number}"
        train(worker, make_strategy(engine, **kind), range(1), save=path)
        resumed = train(worker, make_strategy(engine, **kind), range(1), load=path)
        torch.testing.assert_close(resumed, results["32-true"], rtol=1e-5, atol=1e-6)
    for method, options, kind in (("shampoo", worker.SHAMPOO, Shampoo), ("kfac", worker.KFAC, KFAC)):
        given = {"method": method, "options": options}
        results[method] = train(worker, make_strategy(engine, **given), range(2))
        train(worker, make_strategy(engine, **given), range(1), save=out / method)
        strategy = make_strategy(engine, **given)
        resumed = train(worker, strategy, range(1), load=out / method)
        assert [type(one) for one in strategy.second_order_optimizers] == [kind]
        torch.testing.assert_close(resumed, results[method], rtol=1e-5, atol=1e-6)
    if engine == "fsdp":  # one file
        given = {"method": "shampoo", "options": worker.SHAMPOO, "state_dict_type": "full"}
        train(worker, make_strategy(engine, **given), range(1), save=out / "whole")
        resumed = train(worker, make_strategy(engine, **given), range(1), load=out / "whole")
        torch.testing.assert_close(resumed, results["shampoo"], rtol=1e-5, atol=1e-6)
        strategy = make_strategy(engine, **given)  # weights alone are no reason to take preconditioners
        train(worker, strategy, range(0), load=out / "whole", loads=("model",))
        assert strategy.second_order_optimizers[0].steps == 0
    dist.barrier()
    return results
