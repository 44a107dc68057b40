"""Every option that changes numbers, against a plain float64 Shampoo written from the formulas."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_soo import Shampoo

sys.path.insert(0, str(Path(__file__).parent))
from reference_shampoo import ReferenceShampoo

STEPS, SHAPE = 24, (5, 4)


def compare(options: dict[str, Any], **ours: Any) -> None:
    """Some steps on a quadratic with noise: the two trajectories agree to rounding."""
    generator = np.random.default_rng(0)
    start, target = generator.standard_normal(SHAPE), generator.standard_normal(SHAPE)
    noise = generator.standard_normal((STEPS, *SHAPE))
    reference = ReferenceShampoo(start.copy(), **options)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    all_options = {"refresh_delay": 0, "stagger": False, "workers": "inline", **options, **ours}
    optimizer = Shampoo([parameter], **all_options)
    for step in range(STEPS):
        reference.step(reference.x - target + noise[step])
        parameter.grad = parameter.detach() - torch.from_numpy(target) + torch.from_numpy(noise[step])
        optimizer.step()
        movement = np.abs(reference.x - start).max()
        assert np.abs(parameter.detach().numpy() - reference.x).max() <= 1e-6 * movement, f"step {step + 1}"


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.9]))
    dampening = draw(st.sampled_from([0.0, 0.5])) if momentum else 0.0
    return {
        "lr": 0.05,
        "betas": (draw(st.sampled_from([0.0, 0.9])), draw(st.sampled_from([0.9, 0.99, 1.0]))),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "decoupled_weight_decay": draw(st.booleans()),
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": bool(momentum) and not dampening and draw(st.booleans()),
        "preconditioner_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "relative_eps": draw(st.booleans()),
        "use_bias_correction": draw(st.booleans()),
        "precondition_frequency": draw(st.integers(1, 5)),
        "refresh_delay": draw(st.integers(0, 6)),
        "statistics_frequency": draw(st.integers(1, 5)),
        "start_preconditioning_step": draw(st.integers(1, 14)),
        "exponent_override": draw(st.sampled_from([None, "2k", 2.0, 8.0])),
        "grafting": draw(
            st.sampled_from(
                [None, "sgd", "adagrad", "rmsprop", "adam", "adagrad_normalized", "rmsprop_normalized"],
            )
        ),
        "grafting_beta2": draw(st.sampled_from([0.95, 0.999])),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(configurations())
def test_random_configurations(options: dict[str, Any]) -> None:
    compare(options)


def test_metas_conventions() -> None:
    """Filter before preconditioning, absolute eps, bias correction, decoupled decay; norms per block."""
    meta = {"lr": 0.02, "betas": (0.9, 0.99), "relative_eps": False, "weight_decay": 0.01, "grafting_beta2": 0.99}
    meta["exponent_override"] = "2k"
    compare({**meta, "precondition_frequency": 3, "start_preconditioning_step": 3}, grafting_norm="block")


def test_googles_conventions() -> None:
    """The raw gradient is preconditioned, momentum comes after grafting, nothing is corrected, relative eps."""
    google = {"lr": 0.02, "betas": (0.0, 0.999), "momentum": 0.9, "nesterov": True, "use_bias_correction": False}
    google["exponent_override"] = "2k"
    for grafting in ("sgd", "adagrad", "rmsprop", "rmsprop_normalized"):
        compare({**google, "grafting": grafting, "precondition_frequency": 5, "start_preconditioning_step": 5})
