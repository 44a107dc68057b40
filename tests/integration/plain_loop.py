"""What a Trainer of one or two processes must end with: the mean of the ranks' gradients, in one process."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_soo import Shampoo

BATCH, EPOCHS = 4, 2


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def make_data() -> TensorDataset:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].sin())


def trained(ranks: int, *, by_epoch: bool = False, **options: object) -> dict[str, torch.Tensor]:
    """Parameters after EPOCHS with the AdamW's settings of ``worker_trainer.Model`` and its scheduler, or with one that
    moves once in an epoch; rank r of 2 has the rows r, r + 2, ...
    """
    net = make_net()
    optimizer = Shampoo(net, lr=0.02, weight_decay=0.1, **options)  # type: ignore[arg-type]
    decay = torch.optim.lr_scheduler.StepLR(optimizer, *((1, 0.25) if by_epoch else (5, 0.5)))
    x, y = make_data().tensors
    for _ in range(EPOCHS):
        for start in range(0, len(x), BATCH * ranks):
            for rank in range(ranks):
                rows = slice(start + rank, start + BATCH * ranks, ranks)
                (nn.functional.mse_loss(net(x[rows]), y[rows]) / ranks).backward()
            optimizer.step()
            optimizer.zero_grad()
            if not by_epoch:
                decay.step()
        if by_epoch:
            decay.step()
    optimizer.close()
    return {f"net.{name}": value for name, value in net.state_dict().items()}


def assert_trained(found: dict[str, torch.Tensor], ranks: int, *, by_epoch: bool = False, **options: object) -> None:
    expected = trained(ranks, by_epoch=by_epoch, **options)
    torch.testing.assert_close(dict(found), expected, rtol=1e-4, atol=1e-5)
