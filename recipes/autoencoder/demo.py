"""AdamW against Shampoo with the same AdamW settings: two processes, real digits, a table and a picture.

python recipes/autoencoder/demo.py   (make demo)
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from report import picture, read_run, table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LR = 3e-4  # AdamW's best in adamw_grid.csv, which grid.py makes


def main() -> None:
    lr = LR
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
