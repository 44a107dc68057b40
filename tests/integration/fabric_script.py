"""One of two ranks that ``fabric run`` has started: a loop with AdamW, and one call that makes it second-order."""

import sys
from pathlib import Path

import torch
from launching import leave
from lightning.fabric import Fabric
from plain_loop import BATCH, EPOCHS, make_data, make_net
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, DistributedSampler

from lightning_soo.integrations.fabric import setup


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def train(fabric: Fabric, config: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = Model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)
    decay = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    model, wrapped = setup(fabric, module, optimizer, config=config)
    data = make_data()
    loader = DataLoader(data, BATCH, sampler=DistributedSampler(data, fabric.world_size, fabric.global_rank, False))
    for _ in range(EPOCHS):
        for x, y in loader:
            fabric.backward(nn.functional.mse_loss(model(x), y))
            wrapped.step()
            wrapped.zero_grad()
            decay.step()
    return module, optimizer


if __name__ == "__main__":
    for strategy in sys.argv[3:]:
        fabric = Fabric(strategy=strategy)
        module, optimizer = train(fabric, sys.argv[2])
        whole = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
        if fabric.is_global_zero:
            torch.save(whole, Path(sys.argv[1], f"{strategy}.pt"))
        optimizer.close()
    leave()
