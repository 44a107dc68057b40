"""Train a small GPT with AdamW and Accelerate. Nothing here knows of second order; README.md says how it is launched.

python recipes/accelerate/train.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from small_gpt import SmallGPT  # a LightningModule is an nn.Module
from windows import Windows

GLOBAL_BATCH, LENGTH = 24, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--save", type=Path, help="folder for accelerator.save_state after the last step")
    arguments = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=arguments.accumulate, step_scheduler_with_optimizer=False)
    parts = accelerator.num_processes * arguments.accumulate
    if GLOBAL_BATCH % parts:
        parser.error(f"processes times --accumulate, {parts}, must divide the global batch of {GLOBAL_BATCH}")
    set_seed(0)
    model = SmallGPT(length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps, eta_min=arguments.lr / 10)
    data = DataLoader(Windows("train", arguments.steps * GLOBAL_BATCH, LENGTH), GLOBAL_BATCH // parts)
    held_out = DataLoader(Windows("validation", 10 * GLOBAL_BATCH, LENGTH), GLOBAL_BATCH // accelerator.num_processes)
    model, optimizer, schedule, data, held_out = accelerator.prepare(model, optimizer, schedule, data, held_out)

    for codes in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, codes))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), arguments.clip)
            optimizer.step()
            if accelerator.sync_gradients:
                schedule.step()
            optimizer.zero_grad()
    if arguments.save is not None:
        accelerator.save_state(str(arguments.save))
    model.eval()
    with torch.no_grad():
        losses = [accelerator.reduce(loss_of(model, codes), "mean") for codes in held_out]
    accelerator.print(f"validation loss {float(torch.stack(losses).mean()):.4f} after {arguments.steps} steps")
    accelerator.wait_for_everyone()
    accelerator.end_training()


def loss_of(model: nn.Module, codes: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())


if __name__ == "__main__":
    main()
