"""An Accelerate script as people write them: AdamW, a schedule, accumulation, clipping, save_state and load_state.

It knows nothing of second order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROWS, MICRO_BATCH, ACCUMULATE, CLIP, EPOCHS = 32, 4, 2, 0.1, 3
ADAMW: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-5}


class Net(nn.Module):
    """No size that two ranks divide evenly, and a layer that appears twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        return self.last(self.middle(self.middle(x).tanh()) + x)


def make_data() -> TensorDataset:
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].sin())


def make_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **ADAMW)


def train(
    folder: Path,
    *,
    save: bool = False,
    resume: bool = False,
    seed: int = 0,
    build: Callable[[nn.Module], torch.optim.Optimizer] = make_optimizer,
    prepare: Callable[..., Any] = Accelerator.prepare,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Whole parameters, and the mean loss over ranks of every micro-batch; saved after, or resumed from, one epoch."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE, step_scheduler_with_optimizer=False)
    model = Net(seed)
    optimizer = build(model)
    scheduler = make_schedule(optimizer)
    loader = DataLoader(make_data(), MICRO_BATCH // accelerator.num_processes)
    given = optimizer
    model, optimizer, loader, scheduler = prepare(accelerator, model, optimizer, loader, scheduler)
    assert scheduler.scheduler.optimizer is given  # references of the script stay valid
    losses = []
    if resume:
        accelerator.load_state(str(folder))
    for epoch in range(1 if resume else 0, EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        if save and epoch == 0:
            accelerator.save_state(str(folder))
            accelerator.wait_for_everyone()
    return whole(model), losses


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole parameters by name, on every rank."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {name: value.detach().clone() for name, value in model.module.state_dict().items()}
    if isinstance(model, FSDPModule):
        full = {name: getattr(value, "full_tensor", value.clone)() for name, value in model.state_dict().items()}
        return {name: value.detach() for name, value in full.items()}
    if type(model).__name__ == "DeepSpeedEngine":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.module.parameters())):
            return {name: value.detach().float().clone() for name, value in model.module.named_parameters()}
    inner = model.module if hasattr(model, "module") else model
    return {name: value.detach().clone() for name, value in inner.state_dict().items()}


def leave() -> None:
    """Without the interpreter's own end, in which gloo's threads abort now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    result = {"whole": train(out / "state", save=True), "resumed": train(out / "state", resume=True, seed=7)}
    torch.save({**result, "arguments": sys.argv[1:]}, out / f"script{os.environ.get('RANK', '0')}.pt")
    leave()
