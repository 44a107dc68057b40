"""FSDP1's state as whole tensors, on any device."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)


def whole_state(module: nn.Module) -> AbstractContextManager[Any]:
    """Within it, state dictionaries hold whole tensors on rank 0 and nothing elsewhere.

    Lightning's offloads to the CPU, which for parameters on the CPU frees what is still in use and kills the process.
    """
    context: AbstractContextManager[Any] = FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=True),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=True),
    )
    return context
