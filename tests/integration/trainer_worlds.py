"""A Trainer run that is the same in any number of processes: every rank takes its part of the same batches."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo.callbacks import SecondOrder

BATCH, ROWS = 12, 48
SHAMPOO: dict[str, Any] = {
    "precondition_frequency": 3,
    "start_preconditioning_step": 2,
    "preconditioner_eps": 1e-3,
    "refresh_delay": 2,
    "stagger": True,
}


class Model(L.LightningModule):
    """With a frozen layer, a buffer, a tied weight, and a learning rate that changes each step."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.frozen, self.norm = nn.Linear(5, 7), nn.Linear(7, 7), nn.BatchNorm1d(7)
        self.second, self.third = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.third.weight = self.second.weight
        self.last = nn.Linear(7, 3)
        self.frozen.requires_grad_(False)
        self.norm.eval()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        counted = getattr(self.trainer.model, "global_steps", None)  # DeepSpeed's
        assert counted in (None, self.trainer.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        inputs, targets = (one[rank * BATCH // ranks : (rank + 1) * BATCH // ranks] for one in batch)
        self.norm.eval()
        self.norm.running_mean += 0.01
        hidden = self.norm(self.frozen(self.first(inputs).tanh()))
        hidden = self.third(self.second(hidden).tanh())
        return nn.functional.mse_loss(self.last(hidden), targets)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: its weights are what is looked at."""

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1, eps=1e-5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OneArgument(Model):
    """Lightning does not ask for the batch's number."""

    def training_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


def loader() -> DataLoader[Any]:
    inputs = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].sin()), BATCH)


def make_strategy(engine: str, **options: Any) -> Any:
    from lightning_soo import strategies

    if engine == "auto":
        return "auto"
    if engine == "stock-ddp":
        return "ddp"
    if engine == "ddp":
        return strategies.SecondOrderDDPStrategy(**options)
    if engine == "fsdp2":
        return strategies.SecondOrderFSDP2Strategy(shard_modules=[nn.Linear], **options)
    if engine in ("fsdp", "fsdp-sharded"):
        kind = "sharded" if engine == "fsdp-sharded" else "full"
        # one unit: the tied weight has to be in one
        return strategies.SecondOrderFSDPStrategy(use_orig_params=True, state_dict_type=kind, **options)
    ranks = int(os.environ["WORLD_SIZE"])
    return strategies.SecondOrderDeepSpeedStrategy(
        stage=int(engine[-1]), logging_batch_size_per_gpu=BATCH // ranks, **options
    )


def fit(
    engine: str,
    out: Path,
    *,
    epochs: int = 2,
    path: Path | None = None,
    model: Model | None = None,
    callback: dict[str, Any] | None = None,
    strategy: dict[str, Any] | None = None,
) -> Model:
    """Train; checkpoints of each epoch lie in ``out``."""
    model = model or Model()
    saver = ModelCheckpoint(out, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    callbacks = [saver] if callback is None else [SecondOrder(**{**SHAMPOO, **callback}), saver]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=make_strategy(engine, **(strategy or {})),
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
        default_root_dir=out,
    )
    trainer.fit(model, loader(), ckpt_path=path)
    return model


def main(out: Path, tasks: list[str]) -> None:
    """Args: tasks: ``engine`` trains two epochs; ``engine:name`` goes on from the first epoch of ``name``.

    What goes on from AdamW's, ``adamw-1``, adopts it, and has a ``training_step`` of one argument.
    """
    from launching import leave

    torch.set_num_threads(1)
    for task in tasks:
        engine, *source = task.split(":")
        name = f"{engine}-{os.environ['WORLD_SIZE']}"
        if not source:
            fit(engine, out / name, callback={})
            continue
        folder = out / f"{name}-from-{source[0]}"
        adopts = source[0] == "adamw-1"
        fit(
            engine,
            folder,
            path=out / source[0] / "epoch=0.ckpt",
            model=OneArgument(seed=5) if adopts else Model(seed=5),
            callback={"adopt": True} if adopts else {},
        )
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
