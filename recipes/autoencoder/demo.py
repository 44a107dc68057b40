"""AdamW against Shampoo with the same AdamW settings: two processes, real digits, a table and a picture.

python recipes/autoencoder/demo.py   (make demo)
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import torch
from report import picture, read_run, table

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def best_lr() -> float:
    """AdamW's best learning rate in the committed grid (grid.py makes it anew)."""
    with (HERE / "adamw_grid.csv").open(newline="") as file:
        return float(min(csv.DictReader(file), key=lambda row: float(row["final_loss"]))["lr"])


def main() -> None:
    lr = best_lr()
    runs, digits = [], {}
    for optimizer, name in (("adamw", "AdamW"), ("shampoo", "Shampoo")):
        print(f"== {name}, lr {lr:g}: 400 steps in two processes", flush=True)
        train = [sys.executable, str(HERE / "train.py"), "--optimizer", optimizer, "--lr", str(lr)]
        subprocess.run([*train, "--results", str(RESULTS)], check=True)
        runs.append(read_run(RESULTS / f"{optimizer}.csv", name))
        saved = torch.load(RESULTS / f"{optimizer}_digits.pt", weights_only=True)
        digits.setdefault("digits", saved["input"])
        digits[name] = saved["output"]
    target = float(runs[0].loss[-1])
    picture(runs, target, digits, RESULTS / "autoencoder.png")
    print("\n" + table(runs, target))
    print(f"\nwritten: {RESULTS}/adamw.csv, shampoo.csv, autoencoder.png")


if __name__ == "__main__":
    main()
