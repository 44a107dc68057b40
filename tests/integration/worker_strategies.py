"""One of the ranks: real Trainer runs under one strategy, every check of it in one world."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import worker_fabric
from launching import leave
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo.callbacks import SecondOrder
from lightning_soo.strategies import (
    SecondOrderDDPStrategy,
    SecondOrderDeepSpeedStrategy,
    SecondOrderFSDP2Strategy,
    SecondOrderFSDPStrategy,
)
from lightning_soo.strategies.sharding import start_alike

ROWS, GLOBAL_BATCH, EPOCHS = 48, 8, 2
ADAMW: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-5}
SHAMPOO: dict[str, Any] = {
    "precondition_frequency": 3,
    "start_preconditioning_step": 2,
    "preconditioner_eps": 1e-3,
}
KFAC: dict[str, Any] = {"statistics_frequency": 1, "precondition_frequency": 2, "damping": 1e-2}
# precision, clip, accumulation
COMBINATIONS = [("32-true", None, 1), ("32-true", 0.1, 2), ("bf16-mixed", 0.1, 1)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x).tanh()


class Net(nn.Module):
    """Repeated blocks, layers outside them, and no size that the ranks divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(5, 7), nn.ModuleList([Block(), Block()]), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Bare(L.LightningModule):
    """A module without ``configure_optimizers`` and with a parameter of its own, used outside ``forward``."""

    outside = True  # ZeRO-3 frees it when forward ends

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.scale = Net(), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if self.outside else self.net(x) * self.scale

    def loss(self, batch: Any) -> torch.Tensor:
        prediction = self(batch[0])  # in the middle of the step: the root's hooks run within themselves
        prediction = prediction * self.scale if self.outside else prediction
        return nn.functional.mse_loss(prediction, batch[1].to(prediction.dtype))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)


class Manual(Bare):
    """Manual optimization, and sharding in ``configure_model`` as Lightning documents it, where asked for."""

    def __init__(self, seed: int, sharded: bool) -> None:
        super().__init__(seed)
        self.automatic_optimization, self.sharded = False, sharded

    def configure_model(self) -> None:
        if self.sharded:
            start_alike(self)
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **ADAMW)


class Sharded(Bare):
    """Shards itself, for Lightning's own strategy."""

    def configure_model(self) -> None:
        if isinstance(self.scale, DTensor):
            return
        start_alike(self)
        for block in self.net.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])
        register_fsdp_forward_method(self, "training_step")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **ADAMW)


class Model(Bare):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **ADAMW)


def make_data() -> TensorDataset:
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].sin())


def make_strategy(engine: str, **options: Any) -> Any:
    options = {"method": None, **options}
    if engine == "ddp":
        return SecondOrderDDPStrategy(**options)
    if engine == "fsdp2":
        return SecondOrderFSDP2Strategy(**options)
    if engine == "fsdp":
        return SecondOrderFSDPStrategy(auto_wrap_policy={Block}, **options)
    if engine == "hsdp":
        return SecondOrderFSDP2Strategy(replicate_size=2, **options)
    if engine.startswith("zero"):
        return SecondOrderDeepSpeedStrategy(stage=int(engine[-1]), **options)
    raise ValueError(engine)


def fit(out: Path, strategy: Any, model: L.LightningModule | None = None, **options: Any) -> tuple[L.Trainer, Any]:
    """The weights of rank 0 are those of ``Model()``; what the others start from must not matter."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    model = model or Model(seed=rank)
    path = options.pop("ckpt_path", None)
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": strategy,
            "max_epochs": EPOCHS,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": out,
            **options,
        }
    )
    data = make_data()
    loader, val = DataLoader(data, GLOBAL_BATCH // ranks), DataLoader(data, GLOBAL_BATCH // ranks)
    trainer.fit(model, loader, val, ckpt_path=path)
    assert trainer.global_step == EPOCHS * ROWS // GLOBAL_BATCH // trainer.accumulate_grad_batches
    return trainer, model


def weights(trainer: L.Trainer, model: L.LightningModule) -> dict[str, torch.Tensor]:
    """Whole parameters by name, on every rank."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        # only rank 0 is told the values
        return {name: value for name, value in full.items()}
    if isinstance(trainer.strategy, SecondOrderFSDPStrategy):
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model):
            return {name: value.detach().clone() for name, value in model.state_dict().items()}
    if isinstance(trainer.strategy, SecondOrderDeepSpeedStrategy):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: value.detach().float().clone() for name, value in model.named_parameters()}
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def resumed_equals_whole(out: Path, engine: str, kind: dict[str, Any], name: str) -> None:
    """Saved by ModelCheckpoint after the first epoch and by save_checkpoint after the last, against no interruption."""
    whole = weights(*fit(out, make_strategy(engine, **kind), gradient_clip_val=0.1))
    saver = ModelCheckpoint(out / name, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    run = {"gradient_clip_val": 0.1, "enable_checkpointing": True}
    trainer, _ = fit(out, make_strategy(engine, **kind), callbacks=[saver], **run)
    trainer.save_checkpoint(out / name / "end.ckpt")
    dist.barrier()
    other = Model(seed=7)
    resumed = fit(
        out, make_strategy(engine, **kind), other, gradient_clip_val=0.1, ckpt_path=out / name / "epoch=0.ckpt"
    )
    assert_close(weights(*resumed), whole)
    ended = Model(seed=8)
    trainer, _ = fit(out, make_strategy(engine, **kind), ended, ckpt_path=out / name / "end.ckpt")
    assert_close(weights(trainer, ended), whole)
    found = trainer.validate(ended, DataLoader(make_data(), 4), verbose=False)  # set up again after a fit
    assert math.isclose(found[0]["val"], float(resumed[0].callback_metrics["val"]), rel_tol=1e-4)


def main(engine: str, out: Path) -> None:
    torch.set_num_threads(1)
    if engine.startswith("zero"):
        os.environ["DS_ACCELERATOR"] = "cpu"
    Bare.outside = engine != "zero3"
    results = {}
    for precision, clip, accumulate in COMBINATIONS:
        trainer, model = fit(
            out,
            make_strategy(engine),
            precision=precision,
            gradient_clip_val=clip,
            accumulate_grad_batches=accumulate,
        )
        if engine.startswith("zero"):  # whose own default is 1.0
            assert trainer.strategy.deepspeed_engine.gradient_clipping() == (clip or 0.0)
        results[f"{precision} {clip} {accumulate}"] = weights(trainer, model)
    shampoo = {"method": "shampoo", "options": SHAMPOO}
    results["shampoo"] = weights(*fit(out, make_strategy(engine, **shampoo), gradient_clip_val=0.1))
    strategy = make_strategy(engine, method="kfac", options=KFAC)
    results["kfac"] = weights(*fit(out, strategy, gradient_clip_val=0.1, accumulate_grad_batches=2))
    bare = Bare(seed=int(os.environ["RANK"]))
    results["bare"] = weights(*fit(out, make_strategy(engine, optimizer_options=ADAMW), bare))
    assert "configure_optimizers" not in bare.__dict__
    results["fabric"] = worker_fabric.main(sys.modules[__name__], engine, out)
    torch.save(results, out / f"results{dist.get_rank()}.pt")
    kinds: dict[str, list[dict[str, Any]]] = {
        "fsdp": [{"state_dict_type": "sharded"}, {"state_dict_type": "full", **shampoo}],
        "fsdp2": [{"save_distributed_checkpoint": False}, shampoo],
    }
    for number, kind in enumerate(kinds.get(engine, [{}, shampoo])):
        resumed_equals_whole(out, engine, kind, f"saved{number}")
    if engine == "ddp":
        second_order(out)
    if engine == "fsdp2":
        for sharded in (False, True):
            manual = Manual(int(os.environ["RANK"]), sharded)
            assert_close(weights(*fit(out, make_strategy(engine), manual, num_sanity_val_steps=0)), results["bare"])
        stock(out, results["shampoo"])
    if engine in ("fsdp2", "zero2"):  # together with the callback the optimizer is converted once
        strategy = make_strategy(engine, **shampoo)
        both = fit(out, strategy, callbacks=[SecondOrder(**SHAMPOO)], gradient_clip_val=0.1)
        assert_close(weights(*both), results["shampoo"])
    if engine == "hsdp":
        strategy = SecondOrderFSDPStrategy(
            method=None, auto_wrap_policy={Block}, sharding_strategy="HYBRID_SHARD", device_mesh=(2, 2)
        )
        assert_close(weights(*fit(out, strategy)), results["bare"], atol=1e-5)


def stock(out: Path, expected: dict[str, torch.Tensor]) -> None:
    """Lightning's own strategy for FSDP2 with the callback alone: trained, saved by it, resumed."""
    run = {"gradient_clip_val": 0.1, "num_sanity_val_steps": 0, "limit_val_batches": 0}

    def callbacks() -> list[L.Callback]:
        return [
            SecondOrder(**SHAMPOO),
            ModelCheckpoint(out / "stock", filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True),
        ]

    rank = int(os.environ["RANK"])
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    whole = fit(out, strategy, Sharded(rank), callbacks=callbacks(), enable_checkpointing=True, **run)
    assert_close(weights(*whole), expected)
    resumed = fit(
        out,
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        Sharded(rank + 7),
        callbacks=callbacks()[:1],
        ckpt_path=out / "stock" / "epoch=0.ckpt",
        **run,
    )
    assert_close(weights(*resumed), expected)


def second_order(out: Path) -> None:
    """A strategy does what the callback does, and both together what one does."""
    strategy = SecondOrderDDPStrategy(options=SHAMPOO)
    alone = weights(*fit(out, strategy))
    assert [type(one).__name__ for one in strategy.second_order_optimizers] == ["Shampoo"]
    callback = weights(*fit(out, "ddp", callbacks=[SecondOrder(**SHAMPOO)]))
    both = fit(out, SecondOrderDDPStrategy(options=SHAMPOO), callbacks=[SecondOrder(**SHAMPOO)])
    assert "configure_optimizers" not in both[1].__dict__
    assert_close(alone, callback, atol=0.0)
    assert_close(alone, weights(*both), atol=0.0)
    assert (alone["net.first.weight"] - weights(*fit(out, "ddp"))["net.first.weight"]).abs().max() > 1e-3


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
