"""One of two ranks: real Trainer runs under DDP, every combination in one world."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from launching import leave
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from plain_loop import BATCH, EPOCHS, make_data, make_net
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder

RANKS = 2
OPTIONS: dict[str, Any] = {
    "precondition_frequency": 4,
    "start_preconditioning_step": 2,
    "refresh_delay": 2,
    "preconditioner_eps": 1e-3,  # float32 rounding, which depends on how a batch is split, is not amplified
}
# precision, clip, scheduler, accumulation: each pair of values of two of them occurs
COMBINATIONS = [
    ("32-true", None, True, 1),
    ("32-true", 0.1, False, 2),
    ("bf16-mixed", 0.1, True, 1),
    ("bf16-mixed", None, False, 2),
    ("32-true", 0.1, True, 2),
    ("bf16-mixed", None, True, 2),
    ("bf16-mixed", 0.1, False, 1),
]


class Model(L.LightningModule):
    def __init__(self, scheduler: bool) -> None:
        super().__init__()
        self.net, self.scheduler = make_net(), scheduler

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        if not self.scheduler:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "interval": "step"}]


def fit(out: Path, scheduler: bool = True, callbacks: tuple[L.Callback, ...] = (), **options: Any) -> Any:
    """Returns the trainer and the trained model; rank r of 2 gets rows r, r + 2, ..."""
    path = options.pop("ckpt_path", None)
    model = Model(scheduler)
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": RANKS,
            "strategy": "ddp",
            "max_epochs": EPOCHS,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,  # it would shuffle
            "default_root_dir": out,
            **options,
        },
        callbacks=[SecondOrder(**OPTIONS), *callbacks],
    )
    data = make_data()
    sampler = DistributedSampler(data, RANKS, int(os.environ["RANK"]), shuffle=False)
    trainer.fit(model, DataLoader(data, BATCH, sampler=sampler), DataLoader(data, BATCH), ckpt_path=path)
    return trainer, model


def main(out: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for precision, clip, scheduler, accumulate in COMBINATIONS:
        _, model = fit(
            out,
            scheduler,
            precision=precision,
            gradient_clip_val=clip,
            accumulate_grad_batches=accumulate,
        )
        results[f"{precision} {clip} {scheduler} {accumulate}"] = model.net.state_dict()
    torch.save(results, out / f"combinations{dist.get_rank()}.pt")

    # saved by ModelCheckpoint with refreshes in flight, resumed by a new Trainer, against the uninterrupted run
    _, whole = fit(out, max_epochs=4)
    saver = ModelCheckpoint(out / "saved", save_top_k=-1, save_on_train_epoch_end=True)
    logger = CSVLogger(out, name="logs")
    watchers = (saver, EarlyStopping("val", patience=50), LearningRateMonitor(), PreconditionerMonitor(2))
    fit(out, callbacks=watchers, enable_checkpointing=True, logger=logger, log_every_n_steps=2)
    path = out / "saved" / "epoch=0-step=8.ckpt"
    dist.barrier()
    complete = torch.load(path, weights_only=True)["optimizer_states"][0]["second_order"]
    assert complete["complete"] and complete["steps"] == 8
    _, resumed = fit(out, max_epochs=4, ckpt_path=path)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if dist.get_rank() == 0:
        torch.save(whole.net.state_dict(), out / "whole.pt")
    leave()


def pairwise() -> bool:
    """Whether COMBINATIONS covers every pair of values."""
    for first, second in ((a, b) for a in range(4) for b in range(a)):
        seen = {(row[first], row[second]) for row in COMBINATIONS}
        if seen != set(product({row[first] for row in COMBINATIONS}, {row[second] for row in COMBINATIONS})):
            return False
    return True


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
