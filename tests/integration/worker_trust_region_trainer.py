"""Trainer runs of the callback TrustRegion, in one process or as one of the ranks, every check of it in one world."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torchmetrics
from launching import leave
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo.callbacks import TrustRegion
from lightning_soo.strategies import SecondOrderFSDPStrategy
from lightning_soo.strategies.fsdp_precision import SecondOrderFSDPPrecision
from lightning_soo.strategies.sharding import start_alike

ROWS, GLOBAL_BATCH, EPOCHS = 96, 16, 2
OPTIONS: dict[str, Any] = {"radius": 0.5, "max_radius": 1.0, "max_cg_iterations": 8}
# options, accumulation; validated after every batch, in the middle of an accumulation too
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "accumulated": ({"retries": 2, "weight_decay": 0.01}, 3),
    "part": ({"hessian_fraction": 0.25, "preconditioner": "diagonal"}, 1),
    "parts": ({"hessian_fraction": 0.5, "retries": 1}, 3),
    "kept": ({"keep_graphs": True, "curvature": "gauss_newton"}, 2),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Model(L.LightningModule):
    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(5, 7), Block(), nn.Dropout(dropout), Block(), nn.Linear(7, 3)).double()
        self.dropout = dropout
        self.mean = torchmetrics.MeanMetric()
        self.seen: list[int] = []

    def loss(self, batch: Any) -> dict[str, Tensor]:
        outputs = self.net(batch[0])
        return {"loss": nn.functional.cross_entropy(outputs, batch[1]), "outputs": outputs}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch_idx)
        if self.dropout:  # loaders draw random numbers too
            torch.manual_seed(self.current_epoch * 100 + batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        found = self.loss(batch)
        self.log("loss", found["loss"], on_step=True, on_epoch=True)
        self.mean.update(found["loss"].detach())
        return found

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch)["loss"], sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Sharded(Model):
    """Shards itself, for Lightning's own strategy."""

    def configure_model(self) -> None:
        if isinstance(self.net[0].weight, DTensor):
            return
        start_alike(self)
        for inner in (self.net[1], self.net[3], self.net):
            fully_shard(inner, mesh=self.device_mesh["data_parallel"])


class Batches:
    """A loader that a run interrupted in the middle of an epoch goes on with."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.position, self.first = batches, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, 0
        for index in range(first, len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["position"] % len(self.batches)


class Saving(L.Callback):
    """A checkpoint in the middle of an accumulation, which must change nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 0 and not trainer.fit_loop.epoch_loop.batch_idx:
            trainer.save_checkpoint(self.folder / "batch.ckpt")


def make_data() -> TensorDataset:
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(x, x[:, :3].argmax(1))


def fit(
    out: Path, strategy: Any, options: dict[str, Any] | None, model: L.LightningModule | None = None, **settings: Any
) -> tuple[L.Trainer, Any]:
    """The weights of rank 0 are those of ``Model()``; what the others start from must not matter."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    model = model or Model(seed=rank)
    path, loader = settings.pop("ckpt_path", None), settings.pop("loader", None)
    callbacks = [*([] if options is None else [TrustRegion(**{**OPTIONS, **options})]), *settings.pop("callbacks", [])]
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": strategy,
            "max_epochs": EPOCHS,
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": out,
            "callbacks": callbacks,
            **settings,
        }
    )
    loader = loader or DataLoader(make_data(), GLOBAL_BATCH // ranks)
    trainer.fit(model, loader, DataLoader(make_data(), GLOBAL_BATCH // ranks), ckpt_path=path)
    assert "training_step" not in vars(trainer.strategy)
    assert "backward" not in vars(model) and "configure_optimizers" not in vars(model)
    return trainer, model


def weights(trainer: L.Trainer, model: L.LightningModule) -> dict[str, Tensor]:
    """Whole parameters by name."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    if isinstance(trainer.strategy, SecondOrderFSDPStrategy):
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model):
            return {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Double(SecondOrderFSDPPrecision):
    """Lightning has none for FSDP1: it would make everything float32."""

    mixed_precision_config = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_output(self, data: Any) -> Any:
        return data


def make_strategy(engine: str) -> Any:
    if engine == "fsdp":
        return SecondOrderFSDPStrategy(auto_wrap_policy={Block}, precision_plugin=Double("32-true"))
    if engine == "stock":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return engine if engine in ("ddp", "auto") else f"soo_{engine}"


def resumed(out: Path, engine: str) -> None:
    """Interrupted after the first epoch, against no interruption: bitwise."""
    options, accumulation = {"preconditioner": "diagonal", "hessian_fraction": 0.5}, 2
    kind = Sharded if engine == "stock" else Model
    run: dict[str, Any] = {"accumulate_grad_batches": accumulation, "val_check_interval": 1}
    saver = ModelCheckpoint(out / engine, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    rank = int(os.environ["RANK"])
    whole = fit(out, make_strategy(engine), options, kind(rank), callbacks=[saver], **run)
    (optimizer,) = whole[0].optimizers
    path = out / engine / "epoch=0.ckpt"
    again = fit(out, make_strategy(engine), {**options, "radius": 0.9}, kind(rank + 5), ckpt_path=path, **run)
    expected, found = weights(*whole), weights(*again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (other,) = again[0].optimizers
    assert (other.radius, other.steps) == (optimizer.radius, optimizer.steps)
    assert other.propagations == optimizer.propagations


def main(engine: str, out: Path) -> None:
    torch.set_num_threads(1)
    results = {}
    for name, (options, accumulation) in CASES.items():
        model = Sharded(int(os.environ["RANK"])) if engine == "stock" else None
        run = {"accumulate_grad_batches": accumulation, "val_check_interval": 1}
        saving = [Saving(out / name)] if accumulation > 1 else []
        results[name] = weights(*fit(out, make_strategy(engine), options, model, callbacks=saving, **run))
    torch.save(results, out / f"results{dist.get_rank()}.pt")
    resumed(out, engine)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
