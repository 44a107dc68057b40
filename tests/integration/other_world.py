"""What is trained at several numbers of ranks, with DeepSpeed or in a plain loop, and its cases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate_script import ADAMW, CLIP, Net
from torch import nn

from lightning_soo.optim.base import SecondOrderOptimizer
from lightning_soo.optim.takeover import take_over

ROWS, MICRO_BATCH, ACCUMULATE, EPOCHS = 36, 6, 2, 3  # a micro-batch is divided over 1, 2 or 3 ranks
STEPS = ROWS // MICRO_BATCH // ACCUMULATE  # of an epoch
WARMUP: dict[str, Any] = {"warmup_min_lr": 0.01, "warmup_max_lr": 0.02, "warmup_num_steps": 6, "warmup_type": "linear"}
METHODS: dict[str, dict[str, Any]] = {
    "shampoo": {"momentum": 0.9, "precondition_frequency": 2, "preconditioner_eps": 1e-3},
    "sonew": {},
}
OFFLOADED = {"device": "cpu"}


@dataclass(frozen=True)
class Case:
    """One way to divide a model.

    Attributes:
        zero: of DeepSpeed's ``zero_optimization``.
        others: of its configuration otherwise.
    """

    stage: int
    method: str
    zero: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def is_half(self) -> bool:
        return "bf16" in self.others


BF16 = {"bf16": {"enabled": True}}
CASES = {
    "zero-0": Case(0, "shampoo"),
    "zero-1": Case(1, "shampoo"),
    "BF16_Optimizer": Case(1, "sonew", others={**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "zero-2": Case(2, "sonew"),
    "zero-2 reordered": Case(2, "shampoo", {"round_robin_gradients": True, "parameter_alignment": True}),
    "zero-2 bf16 offloaded": Case(2, "shampoo", {"offload_optimizer": OFFLOADED}, BF16),
    "zero-3": Case(3, "shampoo", {"sub_group_size": 20}),  # all parameters are small enough to be kept whole
    "zero-3 partitioned": Case(3, "sonew", {"sub_group_size": 10, "stage3_param_persistence_threshold": 10}),
    "zero-3 bf16 offloaded": Case(
        3, "shampoo", {"sub_group_size": 20, "offload_optimizer": OFFLOADED, "offload_param": OFFLOADED}, BF16
    ),
}

# number of ranks -> the case it goes on from, of how many ranks, and the case that goes on
ACROSS: dict[int, list[tuple[str, int, str]]] = {
    2: [],
    1: [
        ("zero-2 reordered", 2, "zero-3"),
        ("zero-3", 2, "zero-0"),
        ("zero-3 partitioned", 2, "zero-2"),
        ("zero-2", 2, "BF16_Optimizer"),
        ("zero-2 bf16 offloaded", 2, "zero-3 bf16 offloaded"),
    ],
    3: [("zero-0", 1, "zero-3"), ("zero-3", 1, "zero-2 reordered"), ("zero-1", 2, "zero-0")],
}


class Model(Net):
    """With a frozen parameter that no number of ranks divides, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.factors = nn.Parameter(torch.rand(5) + 0.5, requires_grad=False)
        self.register_buffer("saved_by", torch.tensor(-1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.factors)

    def groups(self) -> list[dict[str, Any]]:
        named = [(name, value) for name, value in self.named_parameters() if value.requires_grad]
        return [
            {"params": [value for name, value in named if "weight" in name]},
            {"params": [value for name, value in named if "weight" not in name], "weight_decay": 0.0},
        ]


def make_rows() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))
    return x, x[:, :3].sin()


def after_epoch(optimizer: torch.optim.Optimizer) -> None:
    """What a user changes by hand and no scheduler knows."""
    optimizer.param_groups[1]["weight_decay"] = 0.5


def plain_loop(method: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Parameters and losses of one process; DeepSpeed's WarmupLR by hand, which says its first value twice."""
    model = Model(0)
    optimizer = torch.optim.AdamW(model.groups(), **ADAMW)
    take_over(optimizer, method, METHODS[method], model)
    assert isinstance(optimizer, SecondOrderOptimizer)
    x, y = make_rows()
    losses: list[float] = []
    for _ in range(EPOCHS):
        for start in range(0, ROWS, MICRO_BATCH):
            loss = nn.functional.mse_loss(model(x[start : start + MICRO_BATCH]), y[start : start + MICRO_BATCH])
            (loss / ACCUMULATE).backward()
            losses.append(float(loss.detach()))
            if len(losses) % ACCUMULATE == 0:
                step = len(losses) // ACCUMULATE - 1
                for group in optimizer.param_groups:
                    group["lr"] = 0.01 + 0.01 * min(1.0, max(0, step - 1) / 6)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        after_epoch(optimizer)
    return {name: value.detach().clone() for name, value in model.named_parameters()}, losses
