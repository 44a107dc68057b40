"""Trajectories of an independent Shampoo (Meta's), and roots against dense float64 solutions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_soo import Shampoo

GOLDEN = Path(__file__).parent.parent / "golden"
sys.path.insert(0, str(GOLDEN))
import problem  # noqa: E402

COMMON = {
    "max_preconditioner_dim": 8,
    "merge_dims": "all",
    "precondition_1d": True,
    "relative_eps": False,
    "grafting_norm": "block",
    "refresh_delay": 0,
    "stagger": False,
    "preconditioner_eps": 1e-6,
    "exponent_override": "2k",
}
ADAM = {"lr": 0.02, "betas": (0.9, 0.99), "grafting": "adam", "grafting_beta2": 0.99, "eps": 1e-8}
CONFIGS = {
    "adagrad": {"lr": 0.1, "betas": (0, 1), "precondition_frequency": 1, "grafting": None},
    "ema_adam": {**ADAM, "precondition_frequency": 3, "weight_decay": 0.01},
    "newton": {**ADAM, "precondition_frequency": 1},
}


@pytest.mark.parametrize("workers", ["inline", "thread"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", problem.PROBLEMS)
def test_golden_trajectory(name: str, config: str, workers: str) -> None:
    initial, gradients = problem.PROBLEMS[name]
    parameters = [torch.nn.Parameter(torch.from_numpy(np.array(value))) for value in initial()]
    optimizer = Shampoo(parameters, **COMMON, **CONFIGS[config], workers=workers)
    reference = [np.load(GOLDEN / "shampoo.npz")[f"{name}/{config}/p{index}"] for index in range(len(parameters))]
    movement = max(np.abs(r[-1] - r[0]).max() for r in reference)
    for step in range(problem.STEPS):
        values = [p.detach().numpy() for p in parameters]
        for parameter, gradient in zip(parameters, gradients(values, step), strict=True):
            parameter.grad = torch.from_numpy(np.ascontiguousarray(gradient))
        optimizer.step()
        for parameter, expected in zip(parameters, reference, strict=True):
            assert np.abs(parameter.detach().numpy() - expected[step + 1]).max() <= 1e-5 * movement
    optimizer.close()
