"""Lightning callbacks, installed as ``lightning_soo.callbacks``."""

import sys

from lightning_soo.callbacks.monitor import PreconditionerMonitor
from lightning_soo.callbacks.second_order import SecondOrder
from lightning_soo.callbacks.trust_region import TrustRegion

if "pytorch_lightning" in sys.modules:
    from lightning_soo.callbacks import other_package as _  # noqa: F401
if "pytorch_lightning" not in sys.modules or "lightning.pytorch" in sys.modules:
    import lightning_soo.strategies  # noqa: F401  # so that a configuration may name them: soo_ddp, soo_fsdp2, ...

__all__ = ["PreconditionerMonitor", "SecondOrder", "TrustRegion"]
