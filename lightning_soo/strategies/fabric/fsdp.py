"""FSDP1, on any device."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from lightning.fabric.plugins.precision.fsdp import FSDPPrecision
from lightning.fabric.strategies.fsdp import FSDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import enable_wrap

from lightning_soo.strategies.fabric.mixin import FabricSecondOrderMixin
from lightning_soo.strategies.fsdp_state import whole_state
from lightning_soo.strategies.sharding import start_alike


class FabricSecondOrderFSDPPrecision(FSDPPrecision):
    """Fabric's, which autocasts for CUDA whatever the device."""

    device_type = "cuda"

    def forward_context(self) -> AbstractContextManager[Any]:
        if self.device_type == "cuda" or "mixed" not in self.precision:
            return super().forward_context()
        return torch.autocast(self.device_type, torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16)


class FabricSecondOrderFSDPStrategy(FabricSecondOrderMixin, FSDPStrategy):
    """Fabric's ``FSDPStrategy`` with second-order training; takes its arguments and those of the mixin.

    Unlike Fabric's it gives every rank the weights of rank 0, and runs on CPUs.
    """

    @property
    def precision(self) -> FSDPPrecision:
        return super().precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        if type(precision) is FSDPPrecision:
            scaler = precision.scaler
            precision = FabricSecondOrderFSDPPrecision(precision.precision)  # type: ignore[arg-type]
            precision.scaler = scaler
        FSDPStrategy.precision.fset(self, precision)  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        if isinstance(self.precision, FabricSecondOrderFSDPPrecision):
            self.precision.device_type = self.root_device.type
        shape = self._fsdp_kwargs.get("device_mesh")
        if not isinstance(shape, tuple):
            super().setup_environment()
            return
        self._fsdp_kwargs["device_mesh"] = None  # Fabric would build it for CUDA
        super().setup_environment()
        self._fsdp_kwargs["device_mesh"] = init_device_mesh(self.root_device.type, shape)

    @property
    def writes_folders(self) -> bool:
        return bool(self._state_dict_type == "sharded")

    def setup_module(self, module: nn.Module) -> Any:
        if any(isinstance(inner, FullyShardedDataParallel) for inner in module.modules()):
            return super().setup_module(module)
        start_alike(module)
        wrapped = FullyShardedDataParallel(module=module, **self._wrapping())
        before = self._fsdp_kwargs
        # Fabric does the rest for a module that is wrapped already, for which it would drop the policy
        self._fsdp_kwargs = {name: value for name, value in before.items() if name != "auto_wrap_policy"}
        try:
            return super().setup_module(wrapped)
        finally:
            self._fsdp_kwargs = before

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._wrapping())
        return context

    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        modules = [one for one in state.values() if isinstance(one, FullyShardedDataParallel)]
        further = any(one is not None for one in (*args, *kwargs.values()))
        if self._state_dict_type == "sharded" or self.root_device.type != "cpu" or len(modules) != 1 or further:
            super().save_checkpoint(path, state, *args, **kwargs)
            return
        path = Path(self.broadcast(path))
        if path.is_dir() and self.is_global_zero:
            shutil.rmtree(path)  # a sharded checkpoint of this name
        saved: dict[str, Any] = {}
        state = self.with_preconditioners(state)
        with whole_state(modules[0]):
            for key, value in state.items():
                if isinstance(value, torch.optim.Optimizer):
                    saved[key] = FullyShardedDataParallel.optim_state_dict(modules[0], value)
                else:
                    saved[key] = value.state_dict() if hasattr(value, "state_dict") else value
        if self.is_global_zero:
            torch.save(saved, path)

    def _wrapping(self) -> dict[str, Any]:
        return {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
            "device_id": self.root_device,  # Fabric's index is None on CPUs, which torch refuses
            **self._fsdp_kwargs,
        }
