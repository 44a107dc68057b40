"""Names of our strategies in the registry of ``pytorch_lightning``, which say that they are not for it."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import StrategyRegistry

_NAMES = ("soo_ddp", "soo_fsdp", "soo_fsdp2", "soo_hsdp", "soo_deepspeed")


def _refuse(strategy_name: str, **_: Any) -> None:
    raise ImportError(
        f"strategy {strategy_name!r} is for the Trainer of the package lightning, and this one is pytorch_lightning's: "
        "write 'import lightning as L' and 'L.Trainer', and let modules and callbacks derive from L's classes. The "
        "callback lightning_soo.callbacks.SecondOrder works with both, under pytorch_lightning's own strategies"
    )


for _name in _NAMES:
    StrategyRegistry.register(_name, _refuse, "not for pytorch_lightning", override=True, strategy_name=_name)
