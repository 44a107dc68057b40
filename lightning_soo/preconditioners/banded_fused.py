"""Which compiled code takes SONew's step where: C++ on a CPU, Triton on a GPU, or none."""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from lightning_soo.preconditioners import banded_host
from lightning_soo.preconditioners.banded_host import HostRuns

if TYPE_CHECKING:
    from lightning_soo.preconditioners.banded_triton import DeviceRuns

logger = logging.getLogger(__name__)

FusedRuns: TypeAlias = "HostRuns | DeviceRuns"


def kind_of_runs(gradient: Tensor, momentum: Tensor, bands: Tensor) -> type[FusedRuns] | None:
    """What carries out a step of these arrays together with others of their device; None where nothing does."""
    if bands.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        kernels = load_kernels()
        if kernels is not None and kernels.is_possible(gradient, momentum, bands):
            found: type[DeviceRuns] = kernels.DeviceRuns
            return found
    return HostRuns if banded_host.is_possible(gradient, momentum, bands) else None


@cache
def load_kernels() -> ModuleType | None:
    """The module of the kernels, or None, said once, where triton is not installed."""
    try:
        return importlib.import_module("lightning_soo.preconditioners.banded_triton")
    except ImportError as error:
        logger.warning("no triton (%s): SONew's step on a GPU runs as separate torch calls, slower", error)
        return None
