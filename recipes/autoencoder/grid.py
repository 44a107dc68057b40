"""AdamW's learning rate for the demo: a grid, extended while its best value is at an edge.

python recipes/autoencoder/grid.py   writes adamw_grid.csv (about 25 s a value on two cores)
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from report import read_run

HERE = Path(__file__).parent
# 1, 3, 10, ... as people write them; half-decades are fine enough for a factor of three in steps
LADDER = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]


def final_loss(lr: float) -> float:
    """Loss of the last pass over the digits, AdamW, two processes."""
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, str(HERE / "train.py"), "--optimizer", "adamw", "--lr", str(lr)]
        subprocess.run([*train, "--results", folder], check=True)
        return float(read_run(Path(folder) / "adamw.csv", "AdamW").loss[-1])


def main() -> None:
    losses = {lr: final_loss(lr) for lr in LADDER[1:5]}
    while True:
        index = LADDER.index(min(losses, key=losses.__getitem__))
        missing = [lr for lr in LADDER[max(0, index - 1) : index + 2] if lr not in losses]
        if not missing:
            break
        losses.update({lr: final_loss(lr) for lr in missing})
    with (HERE / "adamw_grid.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lr", "final_loss"])
        writer.writerows([f"{lr:g}", f"{losses[lr]:.2f}"] for lr in sorted(losses))
    print((HERE / "adamw_grid.csv").read_text())


if __name__ == "__main__":
    main()
