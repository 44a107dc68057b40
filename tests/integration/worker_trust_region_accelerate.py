"""An Accelerate loop of TrustRegionNewtonCG, in one process or as one of the ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from launching import leave
from torch import Tensor
from worker_trust_region_trainer import EPOCHS, GLOBAL_BATCH, OPTIONS, ROWS, Model, make_data

from lightning_soo import TrustRegionNewtonCG
from lightning_soo.integrations import cpu


def main() -> dict[str, Tensor]:
    """As docs/trust_region.md has it."""
    if cpu.is_asked_for():
        cpu.train_on_cpu()
    accelerator = Accelerator(cpu=not cpu.is_asked_for())
    ranks, rank = accelerator.num_processes, accelerator.process_index
    bare = Model()
    model = accelerator.prepare(bare.net)
    optimizer = accelerator.prepare(TrustRegionNewtonCG(model, **OPTIONS))
    optimizer.optimizer.attach(model)
    x, y = make_data().tensors
    share = GLOBAL_BATCH // ranks
    for index in list(range(ROWS // GLOBAL_BATCH)) * EPOCHS:
        first = index * GLOBAL_BATCH + rank * share
        inputs, targets = x[first : first + share], y[first : first + share]

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            return torch.nn.functional.cross_entropy(model(inputs), targets)

        optimizer.step(closure)
    return bare.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = main()
    torch.save(found, Path(sys.argv[1]) / f"rank{Accelerator().process_index}.pt")
    assert Accelerator().num_processes == 2
    leave()
