"""Wrote the checkpoints of this folder, at the last version of format 1; later versions read them and go on.

Each file has a model, its optimizer's state after some steps (refreshes in flight among it), and the parameters that the
same run had after three more steps.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import lightning_soo

sys.path.insert(0, str(Path(__file__).parent))
from runs import OPTIONS, build, train  # noqa: E402

FOLDER = Path(__file__).parent


def main() -> None:
    for method, options in OPTIONS.items():
        model, optimizer = build(method, options)
        train(model, optimizer, range(7))
        saved = {"model": {k: v.clone() for k, v in model.state_dict().items()}, "optimizer": optimizer.state_dict()}
        torch.save(saved, FOLDER / f"{method}.pt")  # before the state changes in place
        train(model, optimizer, range(7, 10))
        saved = torch.load(FOLDER / f"{method}.pt", weights_only=True)
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        torch.save({**saved, "after": after, "version": lightning_soo.__version__}, FOLDER / f"{method}.pt")


if __name__ == "__main__":
    main()
