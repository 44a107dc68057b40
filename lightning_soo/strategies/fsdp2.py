"""FSDP2 and hybrid sharding without ``configure_model``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from lightning_soo.strategies.mixin import SecondOrderStrategyMixin
from lightning_soo.strategies.sharding import shard, start_alike

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class SecondOrderFSDP2Strategy(SecondOrderStrategyMixin, ModelParallelStrategy):
    """Shards the module by ``torch.distributed.fsdp.fully_shard``; every rank trains on its own part of the data.

    A module whose ``configure_model`` has sharded it already is left as it is; the mesh for it is
    ``self.device_mesh["data_parallel"]``, or the whole ``self.device_mesh`` of (replicate, shard).

    Args:
        shard_modules: classes (or their names) whose modules are gathered and freed on their own.
        min_parameters: likewise every module with so many parameters. With neither, each member of a list of
            repeated layers.
        replicate_size: copies of the model, each sharded over ``world size / replicate_size`` ranks; ``"auto"`` is one
            for each node, or two on a single node.
        reshard_after_forward: as ``fully_shard``'s.
        fully_shard_options: further options of ``fully_shard``, such as ``mp_policy``.
        save_distributed_checkpoint: one file for each rank, or one file in all.
        method, options, optimizer_options, portable_checkpoints, asynchronous_checkpoints, adopt: see
            :class:`SecondOrderStrategyMixin`.
    """

    def __init__(
        self,
        shard_modules: Sequence[type[nn.Module] | str] | None = None,
        min_parameters: int | None = None,
        replicate_size: int | Literal["auto"] = 1,
        reshard_after_forward: bool | int | None = None,
        fully_shard_options: Mapping[str, Any] | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        method: str | None = "shampoo",
        options: Mapping[str, Any] | None = None,
        optimizer_options: Mapping[str, Any] | None = None,
        portable_checkpoints: bool = True,
        asynchronous_checkpoints: bool = False,
        adopt: bool = False,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
            method=method,
            options=options,
            optimizer_options=optimizer_options,
            portable_checkpoints=portable_checkpoints,
            asynchronous_checkpoints=asynchronous_checkpoints,
            adopt=adopt,
        )
        self.shard_modules = shard_modules
        self.min_parameters = min_parameters
        self.replicate_size = replicate_size
        self.fully_shard_options = {**(fully_shard_options or {}), "reshard_after_forward": reshard_after_forward}

    @property
    def writes_folders(self) -> bool:
        return bool(self._save_distributed_checkpoint)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # replicas of the parameters are no replicas of the data
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup_environment(self) -> None:
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ValueError("precision='16-mixed' scales gradients on each rank alone: use 'bf16-mixed'")
        self._forget_placeholder()
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self.world_size, self.replicate_size, self.num_nodes)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        if not any(isinstance(inner, FSDPModule) for inner in module.modules()):
            start_alike(module)
            shard(
                module, data_mesh(self.device_mesh), self.shard_modules, self.min_parameters, **self.fully_shard_options
            )
            for step in _STEPS:  # the root's own parameters are whole within these, not only within forward
                # a manual training_step runs backward, which must not happen inside a forward pass
                manual = step == "training_step" and not module.automatic_optimization
                if is_overridden(step, module) and not manual:
                    register_fsdp_forward_method(module, step)
        if is_overridden("configure_model", module):
            super().setup(trainer)
            return
        module.__dict__["configure_model"] = _nothing  # Lightning requires that there is one
        try:
            super().setup(trainer)
        finally:
            del module.__dict__["configure_model"]

    def model_to_device(self) -> None:
        module = self.lightning_module
        assert module is not None
        tensors = chain(module.parameters(), module.buffers())
        if any(tensor.device.type != self.root_device.type for tensor in tensors):
            super().model_to_device()  # exchanges DTensors, which an optimizer that refers to them weakly forbids

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().predict_step, *args, **kwargs)

    def _evaluate(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Without inference mode, whose tensors FSDP2 would keep for training; and the root is sharded again after it,
        which FSDP2 leaves to a backward pass."""
        with torch.inference_mode(False), torch.no_grad():
            try:
                return step(*args, **kwargs)
            finally:
                if isinstance(self.lightning_module, FSDPModule):
                    self.lightning_module.reshard()


def make_mesh(device_type: str, world_size: int, replicate_size: int | Literal["auto"], nodes: int) -> DeviceMesh:
    """(replicate, shard), or Lightning's own two names where nothing is replicated.

    Raises:
        ValueError: ``replicate_size`` does not divide the world size.
    """
    replicas = replicate_size if replicate_size != "auto" else (nodes if nodes > 1 else min(2, world_size))
    if replicas < 1 or world_size % replicas:
        raise ValueError(f"replicate_size={replicas} does not divide the world size {world_size}")
    if replicas == 1:
        return init_device_mesh(device_type, (world_size, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    return init_device_mesh(device_type, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What ``fully_shard`` takes of :func:`make_mesh`."""
    assert mesh.mesh_dim_names is not None
    return mesh["data_parallel"] if "data_parallel" in mesh.mesh_dim_names else mesh


def _nothing() -> None:
    assert dist.is_initialized()
