"""Lightning strategies that train second-order; importing them registers their short names."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_soo.strategies import fabric
from lightning_soo.strategies.ddp import SecondOrderDDPStrategy
from lightning_soo.strategies.deepspeed import SecondOrderDeepSpeedStrategy
from lightning_soo.strategies.fsdp import SecondOrderFSDPStrategy
from lightning_soo.strategies.fsdp2 import SecondOrderFSDP2Strategy
from lightning_soo.strategies.mixin import SecondOrderStrategyMixin

__all__ = [
    "SecondOrderDDPStrategy",
    "SecondOrderDeepSpeedStrategy",
    "SecondOrderFSDP2Strategy",
    "SecondOrderFSDPStrategy",
    "SecondOrderStrategyMixin",
    "fabric",
]

for _name, _strategy, _description, _options in (
    ("soo_ddp", SecondOrderDDPStrategy, "replicas", {}),
    ("soo_fsdp", SecondOrderFSDPStrategy, "FSDP1", {}),
    ("soo_fsdp2", SecondOrderFSDP2Strategy, "FSDP2 without configure_model", {}),
    ("soo_hsdp", SecondOrderFSDP2Strategy, "FSDP2 within, replicas across nodes", {"replicate_size": "auto"}),
    ("soo_deepspeed", SecondOrderDeepSpeedStrategy, "DeepSpeed ZeRO, stage 2 unless given", {}),
):
    StrategyRegistry.register(_name, _strategy, f"second-order training: {_description}", override=True, **_options)
