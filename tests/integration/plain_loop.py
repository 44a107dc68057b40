"""What a Trainer of one or two processes must end with: the mean of the ranks' gradients, in one process."""

from __future__ import annotations

import torch
from torch import nn
from worker_trainer import BATCH, EPOCHS, make_data, make_net

from lightning_soo import Shampoo


def trained(ranks: int, **options: object) -> dict[str, torch.Tensor]:
    """Parameters of ``worker_trainer.Model`` after EPOCHS, with its AdamW's settings and its scheduler."""
    net = make_net()
    optimizer = Shampoo(net, lr=0.02, weight_decay=0.1, **options)  # type: ignore[arg-type]
    decay = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    x, y = make_data().tensors
    for _ in range(EPOCHS):
        for start in range(0, len(x), BATCH * ranks):
            for rank in range(ranks):
                rows = slice(start + rank, start + BATCH * ranks, ranks)
                (nn.functional.mse_loss(net(x[rows]), y[rows]) / ranks).backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
    optimizer.close()
    return {f"net.{name}": value for name, value in net.state_dict().items()}


def assert_trained(found: dict[str, torch.Tensor], ranks: int, **options: object) -> None:
    torch.testing.assert_close(found, trained(ranks, **options), rtol=1e-4, atol=1e-5)
