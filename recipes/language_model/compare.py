"""AdamW against Shampoo on either objective.

python recipes/language_model/compare.py --objective masked run
python recipes/language_model/compare.py --objective masked timing    # on a quiet machine
python recipes/language_model/compare.py --objective masked report
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))
from comparison import Comparison, Contender

FOLDER = Path(__file__).resolve().parent
STEPS = 400
INTRODUCTION = """
The small preset of this recipe: {task}. Two layers of width 64, the King James Bible, five of its books held out.
AdamW is the script as it stands; Shampoo is the same script with `soo.yaml`, so with AdamW's betas, weight decay,
schedule and clipping. Learning rates are tuned in the same way for both, and every budget has its own schedule, with a
warm-up over a tenth of it and a decay to zero at its end. One seed.
"""
TASKS = {
    "masked": "rows of 40 characters, batch 48; six characters of each row are hidden, and predicted from both sides",
    "causal": "rows of 64 characters, batch 32, each predicted from those before it",
}


class Objective(Comparison):
    """Each objective has its own folder of results."""

    @property
    def results(self) -> Path:
        causal = "causal" in self.arguments
        return self.folder / ("comparison_causal" if causal else "comparison")


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--objective", choices=list(TASKS), default="masked")
    given, _ = parser.parse_known_args()
    Objective(
        folder=FOLDER,
        title=f"AdamW and Shampoo, {given.objective} language model",
        introduction=INTRODUCTION.format(task=TASKS[given.objective]),
        contenders=(
            Contender("AdamW", None, (2e-3, 4e-3, 8e-3)),
            Contender("Shampoo", "soo.yaml", (2e-3, 4e-3, 8e-3)),
        ),
        steps=STEPS,
        budgets=(160, 200, 250, 300),
        arguments=("--objective", given.objective),
        seeds=1,
        unit="loss of a token",
    ).main(parser)


if __name__ == "__main__":
    main()
