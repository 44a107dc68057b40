"""FSDP1's precision, with norm clipping and on any device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


class SecondOrderFSDPPrecision(FSDPPrecision):
    """Lightning's, which refuses to clip by norm because it does not know the root module, and autocasts for CUDA."""

    _root: nn.Module | None = None

    @classmethod
    def like(cls, plugin: FSDPPrecision) -> SecondOrderFSDPPrecision:
        """The same precision and the same gradient scaler."""
        precision = cls(plugin.precision)  # type: ignore[arg-type]  # Lightning declares it too widely
        precision.scaler = plugin.scaler
        return precision

    def connect(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[torch.optim.Optimizer], list[Any]]:
        self._root = model
        return super().connect(model, optimizers, lr_schedulers)

    def forward_context(self) -> AbstractContextManager[Any]:
        device = torch.device("cuda") if self._root is None else next(self._root.parameters()).device
        if device.type == "cuda" or "mixed" not in self.precision:
            return super().forward_context()
        return torch.autocast(device.type, torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16)

    def clip_grad_by_norm(self, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        """Clip by the norm over all ranks.

        Raises:
            TypeError: the module is not wrapped as a whole, so that no rank knows that norm.
        """
        if not isinstance(self._root, FullyShardedDataParallel):
            raise TypeError(
                f"gradient_clip_val with algorithm 'norm' needs FSDP around the whole module, found "
                f"{type(self._root).__name__}: do not wrap parts of it in configure_model (use auto_wrap_policy), or "
                "clip by value"
            )
        self._root.clip_grad_norm_(clip_val)
