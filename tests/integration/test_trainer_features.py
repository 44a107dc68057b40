"""What else people use in a Trainer, with the callback in it. Each run is compared with one that does without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soo import Shampoo
from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder

OPTIONS: dict[str, Any] = {"precondition_frequency": 4, "start_preconditioning_step": 2, "refresh_delay": 2}
LR = 0.02


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


class Model(L.LightningModule):
    def __init__(self, lr: float = LR, fused: bool = False) -> None:
        super().__init__()
        self.net, self.lr, self.fused = make_net(), lr, fused
        self.validations = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validations += 1
        self.log("val", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1, fused=self.fused)


def data() -> DataLoader[Any]:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :3].sin()), batch_size=8)


def trainer(tmp_path: Path, *callbacks: L.Callback, second_order: bool = True, **options: Any) -> L.Trainer:
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            **options,
        },
        callbacks=[*([SecondOrder(**OPTIONS)] if second_order else []), *callbacks],
    )


def plain_loop(epochs: int = 2) -> nn.Module:
    """What the Trainer does, by hand."""
    net = make_net()
    optimizer = Shampoo(net, lr=LR, weight_decay=0.1, **OPTIONS)
    for _ in range(epochs):
        for x, y in data():
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    return net


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(tmp_path: Path, fused: bool) -> None:
    """float16 with a loss scale that overflows at first: those steps are skipped by the scaler, nothing is lost."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    model = Model(fused=fused)
    run = trainer(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=0.5, max_epochs=6)
    run.fit(model, data())

    net, scaler = make_net(), torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    optimizer = Shampoo(net, lr=LR, weight_decay=0.1, **OPTIONS)
    for _ in range(6):
        for x, y in data():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.mse_loss(net(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() < 2.0**40, "the scale never overflowed: nothing was tested"
    ours = run.optimizers[0]
    assert isinstance(ours, Shampoo)
    assert 0 < ours.steps < 48 and ours.steps == optimizer.steps and ours.skipped_steps == 0
    assert_same(model.net, net)


def test_the_learning_rate_finder_leaves_no_state(tmp_path: Path) -> None:
    model = Model(lr=0.5)
    run = trainer(tmp_path)
    finder = Tuner(run).lr_find(model, data(), num_training=30, update_attr=False)
    assert finder is not None and len(finder.results["loss"]) > 10
    model.lr = LR
    run.fit(model, data())
    assert isinstance(run.optimizers[0], Shampoo) and run.optimizers[0].steps == 16
    assert_same(model.net, plain_loop())


def test_weight_averaging_averages_the_preconditioned_weights(tmp_path: Path) -> None:
    model = Model()
    trainer(tmp_path, EMAWeightAveraging(decay=0.9)).fit(model, data())
    net = make_net()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = Shampoo(net, lr=LR, weight_decay=0.1, **OPTIONS)
    for _ in range(2):
        for x, y in data():
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
            average.update_parameters(net)
    assert_same(model.net, average.module)


def test_weight_averaging_resumes(tmp_path: Path) -> None:
    whole, first, second = Model(), Model(), Model()
    trainer(tmp_path, EMAWeightAveraging(decay=0.9), max_epochs=4).fit(whole, data())
    half = trainer(tmp_path, EMAWeightAveraging(decay=0.9), enable_checkpointing=True)
    half.fit(first, data())
    path = half.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    trainer(tmp_path, EMAWeightAveraging(decay=0.9), max_epochs=4).fit(second, data(), ckpt_path=path)
    assert_same(second.net, whole.net)


@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
def test_watchers_and_profilers_change_nothing(tmp_path: Path, profiler: str) -> None:
    model = Model()
    logger = CSVLogger(tmp_path)
    watchers = (EarlyStopping("val", patience=20), LearningRateMonitor("step"), PreconditionerMonitor())
    run = trainer(tmp_path, *watchers, logger=logger, profiler=profiler, val_check_interval=3, log_every_n_steps=1)
    run.fit(model, data(), data())
    assert model.validations > 0
    text = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "lr-Shampoo" in text and "second_order/condition_number" in text
    assert_same(model.net, plain_loop())


def test_early_stopping_stops(tmp_path: Path) -> None:
    model = Model()
    run = trainer(tmp_path, EarlyStopping("val", stopping_threshold=1e3), max_epochs=5)
    run.fit(model, data(), data())
    assert run.global_step == 8
    assert_same(model.net, plain_loop(epochs=1))


def test_validate_in_between_and_fit_again(tmp_path: Path) -> None:
    """A second fit starts a new optimizer, as the Trainer always does."""
    model = Model()
    run = trainer(tmp_path)
    run.fit(model, data())
    first = run.optimizers[0]
    trained = copy.deepcopy(model.net)
    run.validate(model, data(), verbose=False)
    assert_same(model.net, trained, rtol=0.0, atol=0.0)
    run.fit_loop.max_epochs = 3
    run.fit(model, data())
    assert run.optimizers[0] is not first
    optimizer = Shampoo(trained, lr=LR, weight_decay=0.1, **OPTIONS)
    for x, y in data():
        optimizer.zero_grad()
        nn.functional.mse_loss(trained(x), y).backward()
        optimizer.step()
    assert_same(model.net, trained)


def test_overridden_optimizer_step(tmp_path: Path) -> None:
    """The recipe for learning-rate warm-up from Lightning's documentation."""

    class Warm(Model):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, (self.trainer.global_step + 1) / 10)

    model = Warm(lr=LR / 10)
    trainer(tmp_path).fit(model, data())
    net = make_net()
    optimizer = Shampoo(net, lr=LR / 10, weight_decay=0.1, **OPTIONS)
    for step in range(16):
        x, y = list(data())[step % 8]
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 10)  # not yet counted there
    assert_same(model.net, net)


class TwoPlayers(L.LightningModule):
    """Manual optimization of two networks by two optimizers, as adversarial training does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 4), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            if batch_idx % (index + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(self.two(self.one(batch[0]).tanh()), batch[1]))
                self.clip_gradients(optimizer, 0.5)
                optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.one.parameters(), lr=LR), torch.optim.Adam(self.two.parameters(), lr=LR)]


def test_several_optimizers_in_manual_optimization(tmp_path: Path) -> None:
    model, reference = TwoPlayers(), TwoPlayers()
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, PreconditionerMonitor(2), logger=logger)
    run.fit(model, data())
    assert [type(optimizer) for optimizer in run.optimizers] == [Shampoo, Shampoo]
    assert [optimizer.steps for optimizer in run.optimizers] == [16, 8]  # type: ignore[attr-defined]
    optimizers = [
        Shampoo(reference.one, lr=LR, weight_decay=0.01, **OPTIONS),
        Shampoo(reference.two, lr=LR, weight_decay=0.0, decoupled_weight_decay=False, **OPTIONS),
    ]
    for _ in range(2):
        for batch_idx, (x, y) in enumerate(data()):
            for index, (optimizer, layer) in enumerate(zip(optimizers, (reference.one, reference.two), strict=True)):
                if batch_idx % (index + 1) == 0:
                    reference.zero_grad()
                    nn.functional.mse_loss(reference.two(reference.one(x).tanh()), y).backward()
                    nn.utils.clip_grad_norm_(layer.parameters(), 0.5)
                    optimizer.step()
    assert_same(model.one, reference.one)
    assert_same(model.two, reference.two)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "second_order/0/condition_number" in header and "second_order/1/condition_number" in header


def test_several_optimizers_resume(tmp_path: Path) -> None:
    whole, first, second = TwoPlayers(), TwoPlayers(), TwoPlayers()
    trainer(tmp_path, max_epochs=3).fit(whole, data())
    half = trainer(tmp_path, max_epochs=1)
    half.fit(first, data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=3).fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    assert_same(second, whole, rtol=0.0, atol=0.0)
