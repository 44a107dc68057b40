"""A program of the package pytorch_lightning, in two processes, that does not know of second order."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from plain_loop import BATCH, EPOCHS, make_data, make_net
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "interval": "step"}]

    def train_dataloader(self) -> DataLoader:
        data = make_data()
        return DataLoader(data, BATCH, sampler=DistributedSampler(data, 2, self.global_rank, shuffle=False))


if __name__ == "__main__":
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=sys.argv[1],
        callbacks=[pl.callbacks.ModelCheckpoint(sys.argv[1], "end")],
    )
    model = Model()
    trainer.fit(model)
    Path(sys.argv[1], f"rank{trainer.global_rank}.txt").write_text(type(trainer.optimizers[0]).__name__)
