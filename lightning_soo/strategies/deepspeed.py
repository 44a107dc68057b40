"""DeepSpeed's ZeRO, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from lightning_soo.integrations.deepspeed_state import engine_counters, restore_counters
from lightning_soo.strategies.deepspeed_config import (
    NumberedDevice,
    prepare_accelerator,
    prepare_config,
)
from lightning_soo.strategies.mixin import SecondOrderStrategyMixin

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class SecondOrderDeepSpeedStrategy(NumberedDevice, SecondOrderStrategyMixin, DeepSpeedStrategy):
    """``DeepSpeedStrategy`` (``stage=1``, 2 or 3) with second-order training; takes its arguments and the mixin's.

    Gradients are clipped by the Trainer's ``gradient_clip_val`` and not otherwise, unless ``config`` says so itself.
    A ``config`` given as a dictionary is copied.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(kwargs.get("config"), dict):
            kwargs["config"] = deepcopy(kwargs["config"])  # Lightning writes into it, and refuses its own traces
        super().__init__(*args, **kwargs)
        assert isinstance(self.config, dict)
        prepare_config(self.config)

    @property
    def writes_folders(self) -> bool:
        return True

    def engine_state(self) -> dict[str, Any]:
        return {"deepspeed": engine_counters(self.deepspeed_engine)}

    def restore_engine_state(self, saved: Mapping[str, Any]) -> None:
        steps = sum(optimizer.steps for optimizer in self.second_order_optimizers)
        restore_counters(self.deepspeed_engine, saved.get("deepspeed"), steps)

    def setup_environment(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_environment()
            return
        prepare_accelerator(self.root_device)
        self._forget_placeholder()
        super(DeepSpeedStrategy, self).setup_environment()  # without the refusal

    def setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> tuple[DeepSpeedEngine, torch.optim.Optimizer]:
        with self.numbered_device():
            return super()._setup_model_and_optimizer(*args, **kwargs)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        with self.numbered_device():
            super()._initialize_deepspeed_inference(model)

    def _init_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        with self.default_optimizer():
            optimizer, scheduler = super()._init_optimizers()
        self.take_over_optimizers([optimizer])
        return optimizer, scheduler
