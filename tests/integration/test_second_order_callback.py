"""The callback over a real Trainer."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo import KFAC, Shampoo
from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder
from lightning_soo.optim.takeover import take_over

OPTIONS: dict[str, Any] = {"precondition_frequency": 4, "start_preconditioning_step": 2, "refresh_delay": 2}


class Model(L.LightningModule):
    def __init__(self, optimizer: str = "adamw", scheduler: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        self.kind, self.scheduler = optimizer, scheduler
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        kinds: dict[str, Any] = {
            "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
            "fused": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
            "adam": lambda p: torch.optim.Adam(p, lr=0.02, foreach=True, weight_decay=0.1),
            "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
            "rmsprop": lambda p: torch.optim.RMSprop(p),
        }
        optimizer = kinds[self.kind](self.parameters())
        if not self.scheduler:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "interval": "step"}]


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].sin()), batch_size=8)


def trainer(tmp_path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("kind", ["adamw", "fused", "adam", "sgd"])
def test_the_graft_alone_is_the_users_optimizer(tmp_path: Path, kind: str) -> None:
    """Before the first roots the trajectory is that of the optimizer that was taken over."""
    plain, ours = Model(kind), Model(kind)
    trainer(tmp_path).fit(plain, data())
    run = trainer(tmp_path, SecondOrder(start_preconditioning_step=1000))
    run.fit(ours, data())
    assert isinstance(run.optimizers[0], Shampoo)
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("precision", "clip", "scheduler", "accumulate"),
    [
        ("32-true", None, True, 1),
        ("32-true", 0.1, False, 2),
        ("bf16-mixed", 0.1, True, 1),
        ("bf16-mixed", None, False, 2),
    ],
)
def test_same_as_the_plain_optimizer_in_a_loop(
    tmp_path: Path, precision: Any, clip: float | None, scheduler: bool, accumulate: int
) -> None:
    model = Model(scheduler=scheduler)
    reference = copy.deepcopy(model)
    trainer(
        tmp_path,
        SecondOrder(**OPTIONS),
        precision=precision,
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
    ).fit(model, data())
    optimizer = Shampoo(reference, lr=0.02, weight_decay=0.1, **OPTIONS)
    decay = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    for _ in range(2):
        for index, (x, y) in enumerate(data()):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = nn.functional.mse_loss(reference.net(x), y)
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(reference.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                if scheduler:
                    decay.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


METHODS: dict[str, dict[str, Any]] = {
    "shampoo": OPTIONS,
    "soap": {"precondition_frequency": 3, "basis": "qr", "workers": "thread"},
    "sonew": {"bandwidth": 2, "start_preconditioning_step": 3},
    "kfac": {"statistics_frequency": 2, "precondition_frequency": 3, "kl_clip": 1e-2},
}


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bitwise_the_uninterrupted_run(tmp_path: Path, method: str) -> None:
    whole, first, second = Model(), Model(), Model()
    options = METHODS[method]
    trainer(tmp_path, SecondOrder(method, **options), max_epochs=4).fit(whole, data())
    run = trainer(tmp_path, SecondOrder(method, **options), max_epochs=2)
    run.fit(first, data())
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["optimizer_states"][0]["second_order"]["steps"] == 16
    trainer(tmp_path, SecondOrder(method, **options), max_epochs=4).fit(second, data(), ckpt_path=path)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("precision", "accumulate"), [("32-true", 2), ("bf16-mixed", 1), ("bf16-mixed", 2)])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_kfac_sees_the_same_examples_as_in_a_loop(tmp_path: Path, precision: Any, accumulate: int, kind: str) -> None:
    """What Lightning divides losses by is known to it; a loop says it with ``accumulate``."""
    options: dict[str, Any] = {"statistics_frequency": 1, "precondition_frequency": 2, "damping": 1e-2}
    model = Model(kind, scheduler=False)
    reference = copy.deepcopy(model)
    run = trainer(tmp_path, SecondOrder("kfac", **options), precision=precision, accumulate_grad_batches=accumulate)
    run.fit(model, data())
    optimizer = take_over(reference.configure_optimizers(), "kfac", options, reference)
    assert isinstance(optimizer, KFAC) and optimizer.options == run.optimizers[0].options
    optimizer.accumulate(accumulate)
    for _ in range(2):
        for index, (x, y) in enumerate(data()):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = nn.functional.mse_loss(reference.net(x), y)
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adaptive_damping_evaluates_the_batch_without_traces(tmp_path: Path) -> None:
    """Losses are compared with the Trainer's own training step; what it logs and draws counts once."""

    class Logging(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("seen", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

    runs = {}
    for adaptive in (None, {"interval": 2, "factor": 0.9}):
        model = Logging("sgd", scheduler=False)
        options = {"statistics_frequency": 1, "precondition_frequency": 2, "damping": 1e-2}
        run = trainer(tmp_path, SecondOrder("kfac", adaptive_damping=adaptive, **options))
        run.fit(model, data())
        runs[adaptive is None] = run.optimizers[0].damping, len(model.losses), run.callback_metrics["seen"]
    assert runs[True][0] == 1e-2 and runs[False][0] != 1e-2
    assert runs[True][1] == 16 and runs[False][1] > 16
    assert runs[True][2] == runs[False][2] == 8


def test_monitor_logs_and_several_fits(tmp_path: Path) -> None:
    model = Model()
    callbacks = (SecondOrder(**OPTIONS), SecondOrder(**OPTIONS), PreconditionerMonitor(every_n_steps=2))
    for version in ("a", "b"):
        logger = CSVLogger(tmp_path, version=version)
        trainer(tmp_path, *callbacks, logger=logger).fit(model, data(), data())
        logger.finalize("success")
        header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
        for name in ("condition_number", "root_residual", "staleness", "graft_ratio", "preconditioned_share"):
            assert f"second_order/{name}" in header
    assert "configure_optimizers" not in model.__dict__


def test_monitor_of_sonew(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="sonew")
    callbacks = SecondOrder("sonew", start_preconditioning_step=3), PreconditionerMonitor(every_n_steps=2)
    trainer(tmp_path, *callbacks, logger=logger).fit(Model(), data(), data())
    logger.finalize("success")
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    ratios = [float(row["second_order/graft_ratio"]) for row in rows if row["second_order/graft_ratio"]]
    assert len(ratios) >= 3 and all(ratio > 0 for ratio in ratios)


def test_what_cannot_be_taken_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="RMSprop"):
        trainer(tmp_path, SecondOrder()).fit(Model("rmsprop"), data())
    with pytest.raises(TypeError, match="precondition_frequency"):
        SecondOrder(precondition_freq=3)
    with pytest.raises(ValueError, match="shampoo"):
        SecondOrder("shampo")
