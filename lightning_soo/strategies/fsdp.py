"""FSDP1, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType
from torch.distributed.fsdp.wrap import enable_wrap

from lightning_soo.strategies.fsdp_precision import SecondOrderFSDPPrecision
from lightning_soo.strategies.fsdp_state import whole_state
from lightning_soo.strategies.mixin import SecondOrderStrategyMixin
from lightning_soo.strategies.sharding import start_alike


class SecondOrderFSDPStrategy(SecondOrderStrategyMixin, FSDPStrategy):
    """``FSDPStrategy`` with second-order training; takes its arguments and those of the mixin.

    Unlike Lightning's it clips gradients by norm, gives every rank the weights of rank 0, and runs on CPUs.
    """

    _wrapped: FullyShardedDataParallel | None = None

    @property
    def writes_folders(self) -> bool:
        return bool(self._state_dict_type == "sharded")

    @property
    def precision_plugin(self) -> FSDPPrecision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if type(plugin) is FSDPPrecision:
            plugin = SecondOrderFSDPPrecision.like(plugin)
        FSDPStrategy.precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        shape = self.kwargs.get("device_mesh")
        if not isinstance(shape, tuple):
            super().setup_environment()
            return
        self.kwargs["device_mesh"] = None  # Lightning would build it for CUDA
        super().setup_environment()
        self.kwargs["device_mesh"] = init_device_mesh(self.root_device.type, shape)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._wrapping()):
            yield

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self._wrapped is not None and self._wrapped.module is model:
            return self._wrapped  # validating after a fit: its parameters are flat already
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return super()._setup_model(model)
        start_alike(model)
        self._wrapped = wrapped = FullyShardedDataParallel(module=model, **self._wrapping())
        before = self.kwargs
        # Lightning does the rest for a module that is wrapped already, for which it would drop the policy
        self.kwargs = {name: value for name, value in before.items() if name != "auto_wrap_policy"}
        try:
            return super()._setup_model(wrapped)
        finally:
            self.kwargs = before

    def _wrapping(self) -> dict[str, Any]:
        return {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
            "device_id": self.root_device,  # Lightning's index is None on CPUs, which torch refuses
            **self.kwargs,
        }

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._state_dict_type == "sharded" or self.root_device.type != "cpu":
            return super().lightning_module_state_dict()
        assert self.model is not None
        with whole_state(self.model):
            return self.model.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if self._state_dict_type == "sharded" or self.root_device.type != "cpu":
            return super().optimizer_state(optimizer)
        assert self.model is not None
        inner = getattr(optimizer, "_optimizer", optimizer)
        with whole_state(self.model):
            state: dict[str, Any] = FullyShardedDataParallel.optim_state_dict(self.model, inner)
            if not self.is_global_zero:
                return state
            return FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_ID, self.model)
