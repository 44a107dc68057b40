"""What a soak does to a run, drawn from its seed: lives, how they end, and what happens at each step."""

from __future__ import annotations

import random
from dataclasses import dataclass

ACCEPTED, SKIPPED, NAN = "accepted", "skipped", "nan"
SAVE_EVERY = 10
FOLDERS = 3  # checkpoints take turns in as many names, so that saving replaces, too
ENDINGS = {
    "clean": 3,
    "one killed": 4,
    "all killed": 3,
    "one killed in a save": 5,
    "all killed in a save": 5,
    "killed while starting": 1,
}


@dataclass(frozen=True)
class Life:
    """From one start of the training processes to their end.

    Attributes:
        steps: after which it ends.
        kills: steps since its start at which root workers are killed.
        max_restarts: of root workers; where it is low, roots are soon computed in the training thread.
        workers: of each rank.
    """

    number: int
    ranks: int
    steps: int
    ending: str
    kills: tuple[int, ...]
    max_restarts: int
    workers: int


def draw_life(seed: int, number: int, ranks: int | None, longest: int) -> Life:
    """
    Args:
        ranks: None draws one.
        longest: steps of a long life, of which every fifth is one; others have up to an eighth.
    """
    draw = random.Random(f"life {seed} {number}")
    chosen = ranks or draw.choice((1, 2, 2, 2, 3, 3))
    is_long = number % 5 == 2  # long enough for what grows to be seen
    steps = longest if is_long else draw.randint(longest // 24, longest // 8)
    ending = draw.choices(list(ENDINGS), list(ENDINGS.values()))[0]
    if is_long and ending == "killed while starting":
        ending = "clean"
    kills = tuple(sorted(draw.randint(1, steps) for _ in range(draw.randint(1, 3) * (4 if is_long else 1))))
    return Life(
        number=number,
        ranks=chosen,
        steps=steps,
        ending=ending,
        kills=kills,
        max_restarts=1 if draw.random() < 0.15 else 1000,
        workers=2 if chosen < 3 else 1,
    )


def last_life(seed: int, number: int, ranks: int | None, steps: int) -> Life:
    """Undisturbed, and long enough for every folder's name to be written again."""
    drawn = draw_life(seed, number, ranks, 1000)
    steps = max(steps, SAVE_EVERY * (FOLDERS + 1))
    return Life(number, drawn.ranks, steps, "clean", (), 1000, drawn.workers)


def draw_outcome(seed: int, life: int, step: int) -> str:
    """Whether a step is taken, skipped by the loop, or has a NaN in its batch; trained again it may be another."""
    draw = random.Random(f"step {seed} {life} {step}").random()
    return SKIPPED if draw < 0.05 else NAN if draw < 0.1 else ACCEPTED


def in_background(seed: int, life: int, step: int) -> bool:
    """Whether the checkpoint of a step is written while training goes on."""
    return random.Random(f"save {seed} {life} {step}").random() < 0.5


def folder_name(step: int) -> str:
    return f"checkpoint-{step // SAVE_EVERY % FOLDERS}"
