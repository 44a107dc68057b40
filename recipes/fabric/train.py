"""Train a small GPT on real text in a loop of one's own, sharded as Fabric is told.

python recipes/fabric/train.py --strategy soo_fsdp2 --devices 2
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported

from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_soo.integrations.fabric import setup  # makes Fabric know soo_ddp, soo_fsdp, soo_fsdp2, ...

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from small_gpt import SmallGPT
from windows import Windows

HERE = Path(__file__).resolve().parent
GLOBAL_BATCH, LENGTH = 24, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", help="ddp, soo_ddp, soo_fsdp, soo_fsdp2, soo_hsdp, soo_deepspeed")
    parser.add_argument("--devices", type=int, help="left out where `fabric run` says it")
    parser.add_argument("--config", default=str(HERE / "soo.yaml"), help="what lightning_soo.load_config takes")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clip", type=float, default=1.0, help="0 with soo_deepspeed, which clips by its own settings")
    arguments = parser.parse_args()

    fabric = Fabric(**{key: value for key in ("strategy", "devices") if (value := getattr(arguments, key)) is not None})
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has launched already, and refuses a second time
        fabric.launch()
    ranks = fabric.world_size
    fabric.seed_everything(0, verbose=False)
    model = SmallGPT(length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    model, optimizer = setup(fabric, model, optimizer, config=arguments.config)

    def loader(part: str, count: int) -> DataLoader[torch.Tensor]:
        windows = Windows(part, count, LENGTH)
        sampler = DistributedSampler(windows, ranks, fabric.global_rank, shuffle=False)
        loaded = DataLoader(windows, GLOBAL_BATCH // ranks, sampler=sampler)
        return fabric.setup_dataloaders(loaded, use_distributed_sampler=False)

    def loss_of(codes: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())

    for codes in loader("train", arguments.steps * GLOBAL_BATCH):
        fabric.backward(loss_of(codes))
        if arguments.clip:
            fabric.clip_gradients(model, optimizer, max_norm=arguments.clip)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses = [fabric.all_reduce(loss_of(codes)) for codes in loader("validation", 10 * GLOBAL_BATCH)]
    fabric.print(f"validation loss {float(torch.stack(losses).mean()):.4f} after {arguments.steps} steps")
    fabric.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
