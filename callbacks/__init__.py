"""Lightning callbacks, installed as ``lightning_soo.callbacks``."""

from lightning_soo.callbacks.monitor import PreconditionerMonitor
from lightning_soo.callbacks.second_order import SecondOrder

__all__ = ["PreconditionerMonitor", "SecondOrder"]
