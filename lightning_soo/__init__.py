"""Second-order training for PyTorch Lightning and Accelerate."""

from typing import TYPE_CHECKING, Any

from lightning_soo._version import __version__

if TYPE_CHECKING:
    from lightning_soo.checkpoint.errors import CheckpointError
    from lightning_soo.checkpoint.report import LoadReport
    from lightning_soo.checkpoint.store import BackgroundSaver, newest_complete
    from lightning_soo.checkpoint_folders import load_checkpoint, save_checkpoint
    from lightning_soo.config import Config, from_config, load_config
    from lightning_soo.optim.kfac import KFAC
    from lightning_soo.optim.refreshing import RefreshError
    from lightning_soo.optim.shampoo import Shampoo
    from lightning_soo.optim.soap import SOAP
    from lightning_soo.optim.sonew import SONew
    from lightning_soo.optim.trust_region import TrustRegionNewtonCG
    from lightning_soo.refresh.workers import WorkerOptions
    from lightning_soo.transport.agreement import AgreementError
    from lightning_soo.transport.waiting import TransportError

__all__ = [
    "KFAC",
    "SOAP",
    "AgreementError",
    "BackgroundSaver",
    "CheckpointError",
    "Config",
    "LoadReport",
    "RefreshError",
    "SONew",
    "Shampoo",
    "TransportError",
    "TrustRegionNewtonCG",
    "WorkerOptions",
    "__version__",
    "from_config",
    "load_checkpoint",
    "load_config",
    "newest_complete",
    "save_checkpoint",
]

# imported when asked for: every Lightning Trainer imports this package by its entry point (autoload)
_MODULES = {
    "save_checkpoint": "checkpoint_folders",
    "newest_complete": "checkpoint.store",
    "load_checkpoint": "checkpoint_folders",
    "LoadReport": "checkpoint.report",
    "CheckpointError": "checkpoint.errors",
    "BackgroundSaver": "checkpoint.store",
    "AgreementError": "transport.agreement",
    "Config": "config",
    "KFAC": "optim.kfac",
    "RefreshError": "optim.refreshing",
    "SOAP": "optim.soap",
    "SONew": "optim.sonew",
    "Shampoo": "optim.shampoo",
    "TransportError": "transport.waiting",
    "TrustRegionNewtonCG": "optim.trust_region",
    "WorkerOptions": "refresh.workers",
    "from_config": "config",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
