"""Second-order training for PyTorch Lightning and Accelerate."""

from lightning_soo._version import __version__
from lightning_soo.config import Config, from_config, load_config
from lightning_soo.optim.kfac import KFAC
from lightning_soo.optim.refreshing import RefreshError
from lightning_soo.optim.shampoo import Shampoo
from lightning_soo.optim.soap import SOAP
from lightning_soo.optim.sonew import SONew
from lightning_soo.refresh.workers import WorkerOptions
from lightning_soo.transport.agreement import AgreementError

__all__ = [
    "KFAC",
    "SOAP",
    "AgreementError",
    "Config",
    "RefreshError",
    "SONew",
    "Shampoo",
    "WorkerOptions",
    "__version__",
    "from_config",
    "load_config",
]
