"""What the Accelerate recipes share: options, schedule, loop and record. Nothing here knows of second order."""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

Measure = Callable[[nn.Module, Any], tuple[Tensor, int]]


def parse_options(description: str | None, presets: Mapping[str, Mapping[str, Any]]) -> argparse.Namespace:
    """The command line: every key of the first preset is an option, whose default is what ``--preset`` says.

    Args:
        presets: by name, the first is the default. Each has at least ``steps``, ``batch_size``, ``lr``, ``warmup``,
            ``weight_decay``, ``beta2``, ``clip`` and ``evaluate_every``; True and False become ``--name`` and
            ``--no-name``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    first = next(iter(presets))
    parser.add_argument("--preset", choices=list(presets), default=first, help=f"default: {first}")
    for name, value in presets[first].items():
        defaults = ", ".join(f"{preset}: {values[name]}" for preset, values in presets.items())
        kind: dict[str, Any] = {"type": type(value)}
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind, help=f"default: {defaults}")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--seed", type=int, default=0, help="of the initialisation and the order of the data")
    parser.add_argument("--data-dir", type=Path, help="the full data set in its own format; see README.md")
    parser.add_argument("--record", type=Path, help="csv file for the losses")
    parser.add_argument("--save", type=Path, help="folder for accelerator.save_state after the last step")
    given = parser.parse_args()
    for name, value in presets[given.preset].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def begin(settings: argparse.Namespace, **options: Any) -> Accelerator:
    """The accelerator and the seed; a batch that processes and micro-batches do not divide is refused.

    Args:
        options: of ``Accelerator``.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.accumulate, step_scheduler_with_optimizer=False, **options
    )
    parts = accelerator.num_processes * settings.accumulate
    if settings.batch_size % parts:
        raise SystemExit(f"processes times --accumulate, {parts}, must divide --batch-size {settings.batch_size}")
    set_seed(settings.seed)
    return accelerator


def make_optimizer(model: nn.Module, settings: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW without decay of vectors."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, settings.beta2))


def make_schedule(optimizer: torch.optim.Optimizer, settings: argparse.Namespace) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over the first part of all steps, then linear decay to zero at the last."""
    warmup = max(1, round(settings.warmup * settings.steps))

    def factor(step: int) -> float:
        left = (settings.steps - step) / max(1, settings.steps - warmup + 1)
        return max(0.0, min((step + 1) / warmup, left))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Order(Sampler[int]):
    """Indices of as many examples as the run takes: one permutation after another, the same on every process."""

    def __init__(self, examples: int, total: int, seed: int) -> None:
        self.examples, self.total, self.seed = examples, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.total
        while left > 0:
            for part in torch.randperm(self.examples, generator=generator)[:left].split(65536):
                yield from part.tolist()  # a list of all would hold an object for each
            left -= self.examples


def train_loader(data: Dataset[Any], settings: argparse.Namespace, processes: int, **options: Any) -> DataLoader[Any]:
    """Micro-batches; those of one step are the same examples however many processes and micro-batches share them."""
    total = settings.steps * settings.batch_size
    order = Order(len(data), total, settings.seed)  # type: ignore[arg-type]
    return DataLoader(data, settings.batch_size // (processes * settings.accumulate), sampler=order, **options)


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    batches: DataLoader[Any],
    held_out: DataLoader[Any],
    measure: Measure,
    settings: argparse.Namespace,
    *,
    per_example: float = 1.0,
    finish: Callable[[nn.Module], None] | None = None,
) -> float:
    """Train with AdamW; returns the last validation loss.

    Args:
        measure: from model and batch the sum of the losses and the number of terms, tokens for example.
        per_example: terms in an example, on average: sums are divided by it and the examples, so that a step is the
            same however its batch is divided.
        finish: called with the prepared model after the last step, on every process.
    """
    optimizer = make_optimizer(model, settings)
    schedule = make_schedule(optimizer, settings)
    model, optimizer, schedule, batches, held_out = accelerator.prepare(model, optimizer, schedule, batches, held_out)
    micro = settings.batch_size // (accelerator.num_processes * settings.accumulate)
    rows: list[dict[str, float]] = []
    losses: list[Tensor] = []
    progress = tqdm(total=settings.steps, unit="step", mininterval=1.0)
    seconds, started, step = 0.0, time.perf_counter(), 0
    for batch in batches:
        with accelerator.accumulate(model):
            loss = measure(model, batch)[0] / (micro * per_example)
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients and settings.clip:
                accelerator.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        schedule.step()
        step += 1
        progress.update()
        if step % settings.evaluate_every and step != settings.steps:
            continue
        trained = float(accelerator.reduce(torch.stack(losses).mean(), "mean"))
        seconds += time.perf_counter() - started  # the clock stands still while the loss is measured
        validated = evaluate(accelerator, model, held_out, measure)
        rows.append({"step": step, "seconds": seconds, "train_loss": trained, "validation_loss": validated})
        progress.set_postfix(train=f"{trained:.4f}", validation=f"{validated:.4f}")
        losses.clear()
        if not math.isfinite(trained):
            break
        started = time.perf_counter()
    progress.close()
    if accelerator.is_main_process and settings.record is not None:
        write(settings.record, rows)
    if settings.save is not None:
        accelerator.save_state(str(settings.save))
    if finish is not None:
        finish(model)
    last = rows[-1]
    accelerator.print(f"validation loss {last['validation_loss']:.4f} after {step} steps, {last['seconds']:.1f} s")
    return last["validation_loss"]


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, held_out: DataLoader[Any], measure: Measure) -> float:
    """Mean loss of a term over all held-out examples.

    Accelerate repeats examples to fill the last batch of every process; with a batch that divides them there are none.
    """
    model.eval()
    sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    if accelerator.device.type == "mps":
        sums = sums.float()
    for batch in held_out:
        loss, terms = measure(model, batch)
        sums += torch.tensor([float(loss), terms], device=sums.device, dtype=sums.dtype)
    model.train()
    total, terms_of_all = accelerator.reduce(sums, "sum").tolist()
    return total / terms_of_all


def write(path: Path, rows: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)
