"""Second-order training with Fabric: one call in place of ``fabric.setup``."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

import lightning_soo.strategies.fabric  # noqa: F401  # so that Fabric(strategy="soo_fsdp2") is known
from lightning_soo.config import Config, Source, load_config
from lightning_soo.integrations.trainer import is_ours
from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.layered import LayeredOptimizer
from lightning_soo.optim.takeover import take_over


def setup(
    fabric: Any,
    module: nn.Module,
    *optimizers: Any,
    config: Source | Config = None,
    accumulate: int = 1,
    data_workers: int = 0,
    **options: Any,
) -> Any:
    """As ``fabric.setup``, with the AdamW, Adam or SGD among ``optimizers`` made into second-order ones.

    They stay the same objects, so schedulers and other references to them stay valid. Under Fabric's own strategies
    they are attached here; those of :mod:`lightning_soo.strategies.fabric` do it themselves, and save them whole
    (``fabric.save`` under ``strategy="ddp"`` needs ``optimizer.consolidate(to=0)`` on every rank before it). Rank 0
    prints the plan. A second-order optimizer of your own is only attached; then there must be no ``config``.

    Args:
        fabric: a ``lightning.fabric.Fabric`` that has been launched.
        module: the model.
        optimizers: what ``fabric.setup`` takes.
        config: what :func:`lightning_soo.load_config` takes; None is the environment variable ``SOO_CONFIG``.
        accumulate: micro-batches in a step, each of whose losses you divide by it; K-FAC has to know.
        data_workers: loading processes of this rank, whose cores background work leaves alone.
        options: ``scheduler``, ``move_to_device``.

    Raises:
        ValueError: a configuration that is refused, none at all, or one for an optimizer that is second-order already.
        TypeError: no optimizer, or one that cannot be taken over.
    """
    if not optimizers:
        raise TypeError("setup was given no optimizer to take over: setup(fabric, model, optimizer, ...)")
    given = config if isinstance(config, Config) or config is None else load_config(config)
    for optimizer in optimizers:
        if isinstance(optimizer, SecondOrderOptimizer):
            if given is not None:
                raise ValueError(
                    f"the optimizer is {type(optimizer).__name__} already, and {given.source} asks for "
                    f"{given.method!r} as well: opt in once. Build an AdamW, or give no config"
                )
            continue
        chosen = given or load_config()
        take_over(optimizer, chosen.method, dict(chosen.options), module).adopts = chosen.adopt
    for optimizer in optimizers:
        optimizer.data_workers = data_workers
        if isinstance(optimizer, LayeredOptimizer):
            optimizer.accumulate(accumulate, getattr(fabric.strategy.precision, "scaler", None))
    prepared = fabric.setup(module, *optimizers, **options)
    if not is_ours(fabric.strategy):
        for optimizer in optimizers:
            optimizer.attach(prepared[0]._forward_module, None if fabric.world_size > 1 else "single")
            rank_zero_info(optimizer.plan_table())
    return prepared
