"""AdamW against Shampoo on the small Transformer; ``comparison.py`` says what run, timing and report do.

python recipes/translation/compare.py run
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from comparison import Comparison, Contender

INTRODUCTION = """
King James to Reina-Valera 1909, verses of at most 100 bytes, seven books held out: loss of a token (nats) over 192 of
their verses. Transformer of width 128, two layers each side, 2,000 tokens, batch 32, float32; AdamW and Shampoo with
the same betas, decay, clipping and schedule.
"""

COMPARISON = Comparison(
    folder=Path(__file__).resolve().parent,
    title="Translation: AdamW against Shampoo",
    introduction=INTRODUCTION,
    contenders=(
        Contender("AdamW", None, (2e-3, 4e-3, 8e-3)),
        Contender("Shampoo", "soo.yaml", (2e-3, 4e-3, 8e-3)),
    ),
    steps=160,
    budgets=(48, 64, 80, 96),
    arguments=("--evaluate-every", "32"),
    seeds=2,
    timed_steps=60,
)

if __name__ == "__main__":
    COMPARISON.main()
