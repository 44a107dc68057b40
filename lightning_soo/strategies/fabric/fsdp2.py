"""FSDP2 and hybrid sharding without a ``parallelize_fn``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_soo.strategies.fabric.mixin import FabricSecondOrderMixin
from lightning_soo.strategies.fsdp2 import data_mesh, make_mesh
from lightning_soo.strategies.sharding import shard, start_alike


class FabricSecondOrderFSDP2Strategy(FabricSecondOrderMixin, ModelParallelStrategy):
    """Shards by ``fully_shard``; every rank trains on its own part of the data.

    Unlike Fabric's ``ModelParallelStrategy``, ``fabric.setup(model, optimizer)`` accepts an optimizer that was built
    before the model was sharded.

    Args:
        shard_modules, min_parameters, replicate_size, reshard_after_forward, fully_shard_options: as
            :class:`lightning_soo.strategies.SecondOrderFSDP2Strategy`'s.
        kwargs: ``method`` and ``options``; those of ``ModelParallelStrategy`` but its sizes.
    """

    def __init__(
        self,
        shard_modules: Sequence[type[nn.Module] | str] | None = None,
        min_parameters: int | None = None,
        replicate_size: int | Literal["auto"] = 1,
        reshard_after_forward: bool | int | None = None,
        fully_shard_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(parallelize_fn=self._parallelize, **kwargs)
        self.shard_modules = shard_modules
        self.min_parameters = min_parameters
        self.replicate_size = replicate_size
        self.fully_shard_options = {**(fully_shard_options or {}), "reshard_after_forward": reshard_after_forward}

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # replicas of the parameters are no replicas of the data
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def writes_folders(self) -> bool:
        return bool(self._save_distributed_checkpoint)

    def setup_environment(self) -> None:
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self.world_size, self.replicate_size, self.num_nodes)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[torch.optim.Optimizer], *args: Any, **kwargs: Any
    ) -> Any:
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        wrapped = self.setup_module(module)
        sharded = dict(wrapped.named_parameters())
        for optimizer in optimizers:
            if optimizer.state:
                raise ValueError(
                    f"{type(optimizer).__name__} has a state for parameters that are now sharded: load it after setup"
                )
            for group in optimizer.param_groups:
                group["params"] = [
                    sharded[names[id(parameter)]] if id(parameter) in names else parameter
                    for parameter in group["params"]
                ]
        scheduler = args[0] if args else kwargs.get("scheduler")
        return wrapped, [self.setup_optimizer(optimizer) for optimizer in optimizers], scheduler

    def _parallelize(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        start_alike(module)
        shard(module, data_mesh(mesh), self.shard_modules, self.min_parameters, **self.fully_shard_options)
        return module
