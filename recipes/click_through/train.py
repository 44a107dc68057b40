"""Train a DLRM with AdamW and Accelerate. Nothing here knows of second order; README.md says how it is launched.

python recipes/click_through/train.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from auc import area_under_curve
from criteo import criteo
from examples import Batch, as_it_is
from flights import flights
from model import DLRM
from presets import PAPER, SMALL, sizes
from training import begin, fit, parse_options, train_loader


class ClickLoss:
    """Sum of the cross-entropies of a batch; keeps scores and labels of the last evaluation."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        dense, categories, labels = batch
        logits = model(dense, categories).float().squeeze(1)
        if model.training:
            self.kept.clear()
        else:
            self.kept.append((logits, labels))
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), len(labels)

    def area_under_curve(self, accelerator: Accelerator) -> float:
        """Over the examples of all processes; each must have as many."""
        logits, labels = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        return area_under_curve(accelerator.gather(logits).cpu(), accelerator.gather(labels).cpu())


def main() -> None:
    settings = parse_options(__doc__, {"small": SMALL, "paper": PAPER})
    accelerator = begin(settings)
    folder, rows, lot = settings.data_dir, settings.table_rows, settings.lot
    data = flights(rows, lot) if folder is None else criteo(folder, rows, lot)
    model = DLRM(data.dense_features, data.table_rows, settings.width, sizes(settings.bottom), sizes(settings.top))
    processes = accelerator.num_processes
    share, evaluated = settings.batch_size // (processes * settings.accumulate), settings.evaluation_batch // processes
    if share % lot or evaluated % lot:
        raise SystemExit(f"--lot {lot} must divide what a process takes at a time: {share} and, held out, {evaluated}")
    in_lots = argparse.Namespace(**{**vars(settings), "batch_size": settings.batch_size // lot})
    batches = train_loader(data.training, in_lots, processes, collate_fn=as_it_is)
    held_out = data.held_out.whole_batches(settings.evaluation_batch, settings.held_out)
    evaluation = DataLoader(held_out, evaluated // lot, collate_fn=as_it_is)
    measure = ClickLoss()
    fit(accelerator, model, batches, evaluation, measure, settings)
    accelerator.print(f"area under the curve {measure.area_under_curve(accelerator):.4f}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
