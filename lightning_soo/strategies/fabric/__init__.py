"""Fabric strategies that train second-order; importing them registers their short names."""

from lightning.fabric.strategies import STRATEGY_REGISTRY

from lightning_soo.strategies.fabric.ddp import FabricSecondOrderDDPStrategy
from lightning_soo.strategies.fabric.deepspeed import FabricSecondOrderDeepSpeedStrategy
from lightning_soo.strategies.fabric.fsdp import FabricSecondOrderFSDPStrategy
from lightning_soo.strategies.fabric.fsdp2 import FabricSecondOrderFSDP2Strategy
from lightning_soo.strategies.fabric.mixin import FabricSecondOrderMixin

__all__ = [
    "FabricSecondOrderDDPStrategy",
    "FabricSecondOrderDeepSpeedStrategy",
    "FabricSecondOrderFSDP2Strategy",
    "FabricSecondOrderFSDPStrategy",
    "FabricSecondOrderMixin",
]

for _name, _strategy, _description, _options in (
    ("soo_ddp", FabricSecondOrderDDPStrategy, "replicas", {}),
    ("soo_fsdp", FabricSecondOrderFSDPStrategy, "FSDP1", {}),
    ("soo_fsdp2", FabricSecondOrderFSDP2Strategy, "FSDP2 without parallelize_fn", {}),
    ("soo_hsdp", FabricSecondOrderFSDP2Strategy, "FSDP2 within, replicas across nodes", {"replicate_size": "auto"}),
    ("soo_deepspeed", FabricSecondOrderDeepSpeedStrategy, "DeepSpeed ZeRO, stage 2 unless given", {}),
):
    STRATEGY_REGISTRY.register(_name, _strategy, f"second-order training: {_description}", override=True, **_options)
