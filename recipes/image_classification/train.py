"""Train ResNet-20 on Fashion-MNIST (or --data-dir) with SGD, AdamW or K-FAC.

python recipes/image_classification/train.py --optimizer sgd
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from contenders import TUNED
from data import Augmented, Pictures, read, split, test_loader, train_loader
from model import ResNet20
from settings import Settings, add_options, chosen
from torch import Tensor, nn

VALIDATIONS = 4  # in an epoch


def make_optimizer(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """K-FAC has the model, since its factors are of layers; the others have the parameters."""
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), **common)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), momentum=settings.momentum, nesterov=True, **common)
    from lightning_soo import KFAC

    names = ("momentum", "damping", "damping_method", "statistics_frequency", "precondition_frequency")
    common |= {name: getattr(settings, name) for name in (*names, "factor_decay", "approximation")}
    optional = ("kl_clip", "start_preconditioning_step", "statistics_positions")
    common |= {name: getattr(settings, name) or None for name in optional}
    optimizer = KFAC(network, **common)
    optimizer.accumulate(settings.accumulate)  # Lightning divides the loss of each part by their number
    return optimizer


class Classifier(L.LightningModule):
    """Args: steps: of the whole run, for the schedule."""

    def __init__(self, settings: Settings, channels: int, classes: int, steps: int) -> None:
        super().__init__()
        self.settings, self.steps = settings, steps
        self.network = ResNet20(channels, classes, settings.width, settings.normalization)
        self.network.to(memory_format=torch.channels_last)  # a third faster on CPUs
        self.loss = nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("validation_accuracy", right, prog_bar=True, batch_size=len(batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("test_accuracy", right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.network, self.settings)
        warmup = max(1, round(self.settings.warmup * self.steps))

        def factor(step: int) -> float:
            left = min(1.0, max(0.0, (self.steps - step) / (self.steps - warmup + 1)))
            decayed = left if self.settings.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
            return min((step + 1) / warmup, decayed) if step < warmup else decayed

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Row:
    """One validation. Args: seconds: of training alone. train_loss: mean since the row before."""

    step: int
    epoch: float
    seconds: float
    train_loss: float
    validation_accuracy: float


class Record(L.Callback):
    """A row at each validation; the clock stands still meanwhile.

    Args:
        steps: in an epoch.
        target: the run ends when the validation accuracy reaches it; None for the whole schedule.
    """

    def __init__(self, steps: int, target: float | None = None) -> None:
        self.steps, self.target = steps, target
        self.rows: list[Row] = []
        self.losses: list[Tensor] = []
        self.seconds, self.started = 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.perf_counter() - self.started

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, loss = trainer.global_step, float(torch.stack(self.losses).mean())
        accuracy = float(trainer.callback_metrics["validation_accuracy"])
        self.rows.append(Row(step, step / self.steps, self.seconds, loss, accuracy))
        reached = self.target is not None and accuracy >= self.target
        trainer.should_stop = trainer.should_stop or reached or not math.isfinite(loss)
        self.losses.clear()
        self.started = time.perf_counter()


def fit(
    settings: Settings, sets: tuple[Pictures, Pictures], target: float | None = None, progress: bool = True
) -> tuple[list[Row], float]:
    """One run: a row a validation, and the accuracy on all test pictures at the end.

    Args:
        sets: training and test set, as `read` gives them.
    """
    L.seed_everything(settings.seed, verbose=False)
    training, validation = split(sets[0], settings.train_examples, settings.validation_examples)
    pixels = training.images.float()
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    loader = train_loader(Augmented(training, mean, std), settings.batch_size, settings.accumulate, settings.seed)
    steps = len(loader) // settings.accumulate
    model = Classifier(settings, training.channels, sets[0].classes, steps * settings.epochs)
    record = Record(steps, target)
    trainer = L.Trainer(
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        val_check_interval=max(1, steps // VALIDATIONS) * settings.accumulate,
        check_val_every_n_epoch=None,  # the interval counts on over the epochs
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        devices=1,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
    )
    held_out = test_loader(Augmented(validation, mean, std))
    trainer.fit(model, loader, held_out)
    if record.losses:  # steps since the last validation
        trainer.validate(model, held_out, verbose=False)
    result = trainer.test(model, test_loader(Augmented(sets[1], mean, std)), verbose=False)
    return record.rows, float(result[0]["test_accuracy"])


def write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows([f"{value:.6g}" for value in astuple(row)] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--data-dir", type=Path, help="of Fashion-MNIST, CIFAR-10's binary version, or train and val")
    parser.add_argument("--image-size", type=int, default=32, help="to which pictures in folders are resized")
    parser.add_argument("--target-accuracy", type=float, help="say when the validation accuracy reached it")
    parser.add_argument("--stop-at-target", action="store_true", help="and end there")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--output", type=Path, help="csv file; results/OPTIMIZER.csv by default")
    arguments = parser.parse_args()
    if arguments.stop_at_target and arguments.target_accuracy is None:
        parser.error("--stop-at-target needs --target-accuracy")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = chosen(arguments, TUNED)
    print(settings)
    sets = read(arguments.data_dir, arguments.image_size)
    rows, accuracy = fit(settings, sets, arguments.target_accuracy if arguments.stop_at_target else None)
    path = arguments.output or Path(__file__).parent / "results" / f"{settings.optimizer}.csv"
    write(rows, path)
    if arguments.target_accuracy is not None:
        row = next((row for row in rows if row.validation_accuracy >= arguments.target_accuracy), None)
        when = f"after {row.step} steps, {row.epoch:.2f} epochs, {row.seconds:.0f} s" if row else "never"
        print(f"validation accuracy {arguments.target_accuracy:g}: {when}")
    print(f"validation accuracy {rows[-1].validation_accuracy:.4f}, test accuracy {accuracy:.4f}; written: {path}")


if __name__ == "__main__":
    main()
