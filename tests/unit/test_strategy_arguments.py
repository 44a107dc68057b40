"""Names and arguments of strategies, before any process group."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_soo import strategies

NAMES = ["soo_ddp", "soo_fsdp", "soo_fsdp2", "soo_hsdp"]


@pytest.mark.parametrize("name", NAMES)
def test_short_names_are_registered(name: str) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=name, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, strategies.SecondOrderStrategyMixin)
    assert trainer.strategy.method == "shampoo"
    assert isinstance(STRATEGY_REGISTRY.get(name), strategies.fabric.FabricSecondOrderMixin)
    if name == "soo_hsdp":
        assert trainer.strategy.replicate_size == StrategyRegistry[name]["init_params"]["replicate_size"] == "auto"


def test_bad_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'shampoo'"):
        strategies.SecondOrderDDPStrategy(method="shampo")
    with pytest.raises(TypeError, match="did you mean 'precondition_frequency'"):
        strategies.SecondOrderFSDP2Strategy(options={"precondition_frequenzy": 3})
    with pytest.raises(ValueError, match="method=None takes nothing over"):
        strategies.SecondOrderFSDPStrategy(method=None, options={"precondition_frequency": 3})
    with pytest.raises(TypeError, match="AdamW has no setting 'weight_dekay'; did you mean 'weight_decay'"):
        strategies.SecondOrderDDPStrategy(optimizer_options={"weight_dekay": 0.1})


def test_deepspeed_configuration() -> None:
    pytest.importorskip("deepspeed")
    given = {"zero_optimization": {"stage": 1}}
    strategy = StrategyRegistry["soo_deepspeed"]["strategy"](config=given)
    assert strategy.config == {**given, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    assert given == {"zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="has an 'optimizer', which cannot be taken over"):
        strategies.SecondOrderDeepSpeedStrategy(config={"optimizer": {"type": "AdamW"}})
    with pytest.raises(ValueError, match=r"'soo', which only .* read: give the strategy method="):
        strategies.SecondOrderDeepSpeedStrategy(config={"soo": {"method": "kfac"}})
