"""Train a ResNet or a Vision Transformer on Fashion-MNIST (or --data-dir), first-order or second-order.

python recipes/image_classification/train.py --optimizer shampoo
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
from classifier import Classifier
from data import parts, read
from datamodule import PictureBatches, Sets
from files import PictureFiles
from optimizers import second_order_callbacks
from presets import PRESETS
from scaling import Scaling, add_scaling_options, chosen_scaling
from settings import Settings, add_options, chosen
from torch import Tensor

VALIDATIONS = 4  # in an epoch


@dataclass(frozen=True)
class Row:
    """One validation. Args: seconds: of training alone. train_loss: mean of all ranks since the row before."""

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
        step = trainer.global_step
        loss = float(trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean"))
        accuracy = float(trainer.callback_metrics["validation_accuracy"])
        self.rows.append(Row(step, step / self.steps, self.seconds, loss, accuracy))
        reached = self.target is not None and accuracy >= self.target
        trainer.should_stop = trainer.should_stop or reached or not math.isfinite(loss)
        self.losses.clear()
        self.started = time.perf_counter()


@dataclass(frozen=True)
class Result:
    """Args: rows: one for each validation. The others are those at the end; of the test, all its pictures."""

    rows: list[Row]
    validation_loss: float
    test_accuracy: float
    is_first_rank: bool


def fit(
    settings: Settings,
    sets: Sets,
    target: float | None = None,
    progress: bool = True,
    scaling: Scaling | None = None,
) -> Result:
    """One run.

    Args:
        sets: training and test set.
        target: validation accuracy at which it ends.
    """
    scaling = scaling or Scaling()
    L.seed_everything(settings.seed, verbose=False)
    batches = PictureBatches(settings, sets, scaling.data_workers)
    pictures, steps = batches.training.pictures, batches.steps
    shape = pictures.channels, batches.classes, pictures.rows
    model = Classifier(settings, *shape, steps * settings.epochs, channels_last=not scaling.shards)
    record = Record(steps, target)
    devices = scaling.devices * scaling.num_nodes * settings.accumulate
    trainer = L.Trainer(
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip or None,
        val_check_interval=max(1, steps // VALIDATIONS) * settings.accumulate,
        check_val_every_n_epoch=None,  # the interval counts on over the epochs
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[record, *second_order_callbacks(settings, scaling.workers)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        **scaling.trainer_options(settings.batch_size // devices),
    )
    trainer.fit(model, batches)
    if record.losses:  # steps since the last validation
        trainer.validate(model, batches, verbose=False)
    validation_loss = float(trainer.callback_metrics["validation_loss"])
    test = trainer.test(model, batches, verbose=False)
    return Result(record.rows, validation_loss, float(test[0]["test_accuracy"]), trainer.is_global_zero)


def write(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows([f"{value:.6g}" for value in astuple(row)] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="paper: presets.py says which")
    add_options(parser)
    parser.add_argument("--data-dir", type=Path, help="of Fashion-MNIST, CIFAR-10's binary version, or train and val")
    parser.add_argument("--image-size", type=int, default=32, help="to which pictures in folders are resized")
    parser.add_argument(
        "--on-demand", action="store_true", help="pictures in folders stay on disk until they are needed"
    )
    parser.add_argument("--target-accuracy", type=float, help="say when the validation accuracy reached it")
    parser.add_argument("--stop-at-target", action="store_true", help="and end there")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--output", type=Path, help="csv file; results/OPTIMIZER.csv by default")
    add_scaling_options(parser)
    arguments = parser.parse_args()
    if arguments.stop_at_target and arguments.target_accuracy is None:
        parser.error("--stop-at-target needs --target-accuracy")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = chosen(arguments, PRESETS[arguments.preset])
    sets: Sets
    if arguments.on_demand:
        if arguments.data_dir is None:
            parser.error("--on-demand needs --data-dir, of train and val")
        training, testing = (PictureFiles.of(folder, arguments.image_size) for folder in parts(arguments.data_dir))
        sets = training, testing
    else:
        sets = read(arguments.data_dir, arguments.image_size)
    target = arguments.target_accuracy if arguments.stop_at_target else None
    result = fit(settings, sets, target, scaling=chosen_scaling(arguments))
    if result.is_first_rank:
        path = arguments.output or Path(__file__).parent / "results" / f"{settings.optimizer}.csv"
        write(result.rows, path)
        report(settings, result, arguments.target_accuracy)
        print(f"written: {path}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def report(settings: Settings, result: Result, target: float | None) -> None:
    print(settings)
    if target is not None:
        row = next((row for row in result.rows if row.validation_accuracy >= target), None)
        when = f"after {row.step} steps, {row.epoch:.2f} epochs, {row.seconds:.0f} s" if row else "never"
        print(f"validation accuracy {target:g}: {when}")
    accuracies = f"validation accuracy {result.rows[-1].validation_accuracy:.4f}, test {result.test_accuracy:.4f}"
    print(f"{accuracies}, validation loss {result.validation_loss:.6f} after {result.rows[-1].step} steps")


if __name__ == "__main__":
    main()
