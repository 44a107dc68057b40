"""Entry point of every Lightning Trainer: nothing, unless the environment variable ``SOO_LIGHTNING`` is set.

Its value is a configuration: ``SOO_LIGHTNING=soo.yaml python train.py``. It is a variable of its own, because
``SOO_CONFIG`` only says what, to whoever asks (a launch with Accelerate, a call), and must not change Trainers that did
not ask. Nothing else is imported here: a Trainer that does not ask pays for reading one variable.
"""

from __future__ import annotations

import os
from typing import Any

ENVIRONMENT_VARIABLE = "SOO_LIGHTNING"


def callbacks() -> list[Any]:
    """For ``lightning.pytorch.callbacks_factory`` and ``pytorch_lightning.callbacks_factory``.

    Raises:
        ValueError: a configuration that is refused.
        FileNotFoundError: the file is missing.
    """
    if not os.environ.get(ENVIRONMENT_VARIABLE):
        return []
    from lightning_soo.callbacks.environment import SecondOrderByEnvironment

    return [SecondOrderByEnvironment()]
