"""The fused kernel for one neighbour against the separate functions: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from lightning_soo.linalg import banded
from lightning_soo.preconditioners.banded import BandedStatistics, direction

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
runs_here = pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter, in a process of its own")


@pytest.mark.skipif(HERE, reason="the other tests run in this process")
def test_in_the_interpreter() -> None:
    """Triton decides when it is imported whether it interprets, and torch may have imported it already."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@pytest.fixture(name="kernels", scope="module")
def fixture_kernels() -> ModuleType:
    return importlib.import_module("lightning_soo.preconditioners.banded_triton")


@runs_here
@pytest.mark.parametrize("ridge_per", ["tensor", "chain", "element"])
@pytest.mark.parametrize(("n", "start", "chain_length"), [(1, 0, 1), (2500, 0, 2500), (2500, 17, 50), (2049, 3, 1024)])
def test_kernel_gives_what_the_parts_give(
    kernels: ModuleType, n: int, start: int, chain_length: int, ridge_per: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = BandedStatistics.zeros(n, 1, start=start, chain_length=chain_length, device=DEVICE)
    fused = BandedStatistics.zeros(n, 1, start=start, chain_length=chain_length, device=DEVICE)
    momentum, old, new, out = (torch.zeros(n, device=DEVICE) for _ in range(4))
    spare = torch.full_like(fused.bands, float("nan"))
    owned = (min(1, n - 1), n)
    for step, factor in enumerate((1.0, 1.0, 2.0**-60, 1.0, 1.0, 1.0), start=1):
        noise = torch.randn(n, generator=generator)
        gradient = ((noise + 0.8 * noise.roll(1)) * factor).to(DEVICE)
        magnitude, correction = 5.0 * factor, 1 - 0.9**step
        momentum.lerp_(gradient, 0.1)
        parts.observe(gradient, decay=0.9, weight=0.1, magnitude=magnitude)
        ridge = banded.chain_peaks(parts.bands, start, chain_length) * 1e-2
        expanded = banded.expand_chains(ridge, n, start, chain_length).contiguous()
        if ridge_per == "tensor":
            ridge = expanded = ridge.amax()
        elif ridge_per == "element":
            ridge = expanded
        expected = direction(parts.bands, momentum, ridge=expanded, gamma=0.3)
        spare, total, graft = kernels.tridiagonal_step(
            fused, gradient, old, new_bands=spare, new_momentum=new, beta1=0.9, decay=0.9, weight=0.1,
            magnitude=magnitude, correction=correction, eps=1e-8, ridge=ridge, gamma=0.3, out=out, owned=owned,
        )  # fmt: skip
        old, new = new, old
        torch.testing.assert_close(old, momentum, rtol=1e-5, atol=1e-7 * float(momentum.abs().max()))
        torch.testing.assert_close(fused.bands, parts.bands, rtol=1e-5, atol=1e-7 * float(parts.bands.abs().max()))
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        adam = momentum / ((parts.bands[0] / correction).sqrt() / parts.scale + 1e-8)
        for value, array in zip((total, graft), (expected, adam), strict=True):
            reference = array[slice(*owned)].double().square().sum()
            torch.testing.assert_close(value, reference, rtol=1e-3, atol=0.0)


@runs_here
def test_refusals(kernels: ModuleType) -> None:
    statistics = BandedStatistics.zeros(8, 1, chain_length=8, device=DEVICE)
    momentum, out, ridge = torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE), torch.ones((), device=DEVICE)
    options = {
        "beta1": 0.9, "decay": 0.9, "weight": 0.1, "magnitude": 1.0, "correction": 0.1, "eps": 1e-8, "gamma": 0.0,
        "ridge": ridge, "out": out,
    }  # fmt: skip
    with pytest.raises(ValueError, match="must not be the arrays"):
        kernels.tridiagonal_step(
            statistics, out, momentum, new_bands=statistics.bands, new_momentum=out.clone(), **options
        )
    with pytest.raises(ValueError, match="bandwidth 1 and float32"):
        kernels.tridiagonal_step(
            statistics, out, momentum, new_bands=statistics.bands.double(), new_momentum=out.clone(), **options
        )
