"""DeepSpeed's ZeRO, on any device."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
from lightning.fabric.utilities.seed import reset_seed

from lightning_soo.strategies.deepspeed_config import (
    NumberedDevice,
    prepare_accelerator,
    prepare_config,
)
from lightning_soo.strategies.fabric.mixin import FabricSecondOrderMixin


class FabricSecondOrderDeepSpeedStrategy(NumberedDevice, FabricSecondOrderMixin, DeepSpeedStrategy):
    """Fabric's ``DeepSpeedStrategy`` with second-order training; takes its arguments and those of the mixin.

    Gradients are clipped where ``config`` has ``gradient_clipping``, and not otherwise (DeepSpeed's own default is 1).
    A ``config`` given as a dictionary is copied.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(kwargs.get("config"), dict):
            kwargs["config"] = deepcopy(kwargs["config"])
        super().__init__(*args, **kwargs)
        assert isinstance(self.config, dict)
        prepare_config(self.config)
        self.config.setdefault("gradient_clipping", 0.0)

    @property
    def writes_folders(self) -> bool:
        return True

    def setup_environment(self) -> None:
        if self.root_device.type == "cuda":
            super().setup_environment()
            return
        prepare_accelerator(self.root_device)
        super(DeepSpeedStrategy, self).setup_environment()  # without the refusal

    def _setup_distributed(self) -> None:
        if self.root_device.type == "cuda":
            super()._setup_distributed()
            return
        reset_seed()
        self._set_world_ranks()
        self._init_deepspeed_distributed()
        if not self._config_initialized:
            self._format_config()
            self._config_initialized = True

    def _initialize_engine(self, *args: Any, **kwargs: Any) -> Any:
        with self.numbered_device():
            return super()._initialize_engine(*args, **kwargs)
