"""Lightning's ``Callback``, under the package name that is in use.

``lightning.pytorch`` and ``pytorch_lightning`` have the same classes twice, and each checks for its own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:

    def _callback_class() -> Any:
        names = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
        bases = tuple(import_module(name).Callback for name in names or ["lightning.pytorch"])
        return bases[0] if len(bases) == 1 else type("Callback", bases, {"__module__": __name__})

    Callback = _callback_class()

__all__ = ["Callback"]
