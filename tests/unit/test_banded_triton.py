"""The kernels of SONew's step against the separate functions: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from banded_runs import Both, Pair, assert_equal, run_pairs, share_removed
from torch import nn

from lightning_soo import SONew
from lightning_soo.optim.banded_work import Work
from lightning_soo.preconditioners import banded_fused
from lightning_soo.preconditioners.banded_host import HostRuns

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = DEVICE.type == "cuda" or INTERPRETED
runs_here = pytest.mark.skipif(not HERE, reason="run by test_in_the_interpreter, in a process of its own")
# n, length of a chain, start: shorter than a program's width and longer, several programs, cut pieces
SHAPES = [
    (0, 5, 0), (1, 1, 0), (1500, 1, 3), (7, 3, 0), (50, 3, 1), (7, 100, 0), (800, 255, 0), (5000, 7, 5),
    (2500, 1003, 11), (5000, 2500, 0), (5000, 2500, 100), (3000, 2048, 7), (3000, 10**6, 123), (3100, 10**6, 1024),
    (3000, 2500, 2400),
]  # fmt: skip


@pytest.mark.skipif(HERE, reason="the other tests run in this process")
def test_in_the_interpreter() -> None:
    """Triton decides when it is imported whether it interprets, and torch may have imported it already."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no compiler")
@pytest.mark.parametrize(
    "options", [(8, 128, False, False, True), (1, 1024, True, True, True), (4, 256, False, True, False)]
)
def test_compiled_for_a_gpu_it_loads_before_it_stores(options: tuple[Any, ...]) -> None:
    """What the interpreter cannot show: neighbours are in registers before anyone overwrites them. Needs no GPU."""
    triton = pytest.importorskip("triton", minversion="3.6")
    kernels = importlib.import_module("lightning_soo.preconditioners.banded_kernels_triton")
    compiler, backends = (importlib.import_module(name) for name in ("triton.compiler", "triton.backends.compiler"))
    for dtype in (triton.language.float32, triton.language.bfloat16):
        constants = dict(zip(kernels.step.arg_names[5:], (*options[:2], dtype, *options[2:]), strict=True))
        pointers = zip(kernels.step.arg_names, ("*i64", "*fp64", "*i64", "*fp32", "*fp64"), strict=False)
        source = compiler.ASTSource(
            fn=kernels.step,
            signature={**dict(pointers), **dict.fromkeys(constants, "constexpr")},
            constexprs={(kernels.step.arg_names.index(name),): value for name, value in constants.items()},
        )
        target = backends.GPUTarget("cuda", 80, 32)
        code = triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]
        order = "".join(
            {"ld.global": "L", "bar.sync": "B", "st.global": "S"}[name]
            for name in re.findall(r"ld\.global|bar\.sync|st\.global", code)
        )
        # then the table's owned elements are read, sums are reduced, and each is stored
        assert re.fullmatch(r"[LB]+B+S+L*B+SB+S", order), order
        assert not re.search(r"(div|sqrt)\.[a-z]+\.f64", code)


@pytest.fixture(name="kernels", scope="module")
def fixture_kernels() -> ModuleType:
    return importlib.import_module("lightning_soo.preconditioners.banded_triton")


def run_all(
    kernels: ModuleType, shapes: list[tuple[int, ...]], bandwidth: int, steps: int, **options: Any
) -> list[Both]:
    pairs = [
        Pair(n, bandwidth, length, start, **{"dtype": torch.float32, "device": DEVICE, **options})
        for n, length, start in shapes
    ]
    return run_pairs(kernels.DeviceRuns, pairs, steps)


@runs_here
@pytest.mark.parametrize("per_chain", [False, True])
@pytest.mark.parametrize("bandwidth", [0, 1])
def test_equals_the_separate_functions(kernels: ModuleType, bandwidth: int, per_chain: bool) -> None:
    """All shapes in one step."""
    for both in run_all(kernels, SHAPES, bandwidth, 3, per_chain=per_chain):
        assert_equal(both, 2e-3)


@runs_here
@pytest.mark.parametrize("shape", [(3000, 300, 0), (2500, 10**6, 5)])
def test_edges_are_removed(kernels: ModuleType, shape: tuple[int, int, int]) -> None:
    (both,) = run_all(kernels, [shape], 1, 6, gamma=0.55)
    # at the threshold itself rounding decides: the bands agree, and almost all directions
    assert_equal({name: both[name] for name in ("bands", "momentum")}, 1e-5)
    found, expected = both["direction"]
    wrong = (found - expected).abs() > 2e-3 * expected.abs().max()
    assert wrong.double().mean() < 2e-3
    assert 0.02 < share_removed(both, 0.55) < 0.98


@runs_here
@pytest.mark.parametrize("bandwidth", [0, 1])
def test_only_owned_elements_are_summed(kernels: ModuleType, bandwidth: int) -> None:
    for owned in ((5, 1990), (1200, 1210), (300, 300)):
        for both in run_all(kernels, [(2000, 10**6, 17), (2000, 77, 17)], bandwidth, 2, owned=owned):
            assert_equal(both, 2e-3)


@runs_here
@pytest.mark.parametrize("magnitude", [1e20, 1e-20])
@pytest.mark.parametrize("bandwidth", [0, 1])
def test_extreme_gradients(kernels: ModuleType, bandwidth: int, magnitude: float) -> None:
    for both in run_all(kernels, [(1500, 300, 0), (2500, 10**4, 9)], bandwidth, 4, magnitude=magnitude):
        assert_equal(both, 2e-3)


@runs_here
@pytest.mark.parametrize(("outer", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("bandwidth", [0, 1])
def test_half_precision(kernels: ModuleType, bandwidth: int, outer: torch.dtype, tolerance: float) -> None:
    for both in run_all(kernels, [(1500, 300, 0), (2500, 10**4, 9)], bandwidth, 4, outer=outer):
        assert_equal(both, tolerance)


@runs_here
def test_programs_may_run_in_any_order(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs them one after the other: forwards in the tests above, backwards here."""
    forwards = run_all(kernels, SHAPES, 1, 2)
    make = kernels._plan.__wrapped__

    def reversed_plan(*arguments: Any) -> Any:
        plan = make(*arguments)
        for _, first, last in plan.launches:
            plan.programs[first:last] = plan.programs[first:last].flip(0)
        return plan

    monkeypatch.setattr(kernels, "_plan", reversed_plan)
    for one, other in zip(forwards, run_all(kernels, SHAPES, 1, 2), strict=True):
        for name in ("bands", "momentum", "direction"):
            assert torch.equal(one[name][0], other[name][0])


@runs_here
def test_the_last_coupling(kernels: ModuleType) -> None:
    """At the end of a chain it becomes zero; at the end of a run within a chain it stays as it was."""
    for n, chain_length in ((6, 6), (6, 100), (3000, 3000), (3000, 10**5)):
        bands = torch.full((2, n), 7.0, device=DEVICE)
        runs = kernels.DeviceRuns()
        runs.add(
            torch.ones(n, device=DEVICE), torch.zeros(n, device=DEVICE), bands, start=0, chain_length=chain_length,
            owned=(0, n), beta1=0.9, decay=0.5, weight=0.5, scale=1.0, graft_eps=0.0, ridge=1e-4, gamma=0.0,
        )  # fmt: skip
        runs.carry_out()
        assert bands[1].tolist() == [4.0] * (n - 1) + [0.0 if n == chain_length else 7.0]
        assert bands[0].tolist() == [4.0] * n


class Counted:
    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches, self.programs = kernel, 0, 0

    def __getitem__(self, grid: tuple[int]) -> Any:
        self.launches, self.programs = self.launches + 1, self.programs + grid[0]
        return self.kernel[grid]


@runs_here
def test_launches_are_few_and_tables_kept(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {name: Counted(getattr(kernels, name)) for name in ("set_aside", "step", "add_up")}
    for name, counter in counted.items():
        monkeypatch.setattr(kernels, name, counter)
    kernels._plan.cache_clear()
    shapes = [(96 + 96 * index, 96, 0) for index in range(15)] + [(2500 + index, 5000, 0) for index in range(15)]
    run_all(kernels, shapes, 1, 2)
    assert [counter.launches for counter in counted.values()] == [2 * 1, 2 * 2, 2 * 1]
    assert counted["set_aside"].programs == 2 * 15 * 3
    assert kernels._plan.cache_info().misses == 1
    runs = kernels.DeviceRuns()
    assert len(runs) == 0 and runs.carry_out().shape == (0, 2)


@runs_here
def test_what_it_cannot_do_is_refused(kernels: ModuleType) -> None:
    values, bands = torch.zeros(10, device=DEVICE), torch.zeros(2, 10, device=DEVICE)
    assert kernels.is_possible(values, values, bands)
    assert not kernels.is_possible(values, values, torch.zeros(3, 10, device=DEVICE))
    assert not kernels.is_possible(values, values.bfloat16(), bands)
    assert not kernels.is_possible(values, values, bands.bfloat16())
    assert not kernels.is_possible(values[::2], values[::2], bands[:, :5])
    assert not kernels.is_possible(values.double(), values.double(), bands.double())
    with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
        kernels.DeviceRuns().add(
            values.double(), values.double(), bands.double(), start=0, chain_length=5, owned=(0, 10), beta1=0.9,
            decay=0.9, weight=0.1, scale=1.0, graft_eps=0.0, ridge=0.0, gamma=0.0,
        )  # fmt: skip


def test_without_triton_it_says_so_once_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("banded_triton", "banded_kernels_triton"):
        monkeypatch.delitem(sys.modules, f"lightning_soo.preconditioners.{name}", raising=False)
    banded_fused.load_kernels.cache_clear()
    parameters = [nn.Parameter(torch.randn(4, 5, device=DEVICE)) for _ in range(2)]
    optimizer = SONew(parameters, start_preconditioning_step=1)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    banded_fused.load_kernels.cache_clear()
    assert caplog.text.count("no triton") == 1
    assert all(torch.isfinite(parameter).all() for parameter in parameters)


@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relative_eps", [True, False])
def test_an_optimizer_takes_them(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, relative_eps: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5), nn.Tanh()).to(DEVICE, dtype)
    nets = [first, copy.deepcopy(first)]
    inputs = torch.randn(6, 8, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    counted = Counted(kernels.step)
    monkeypatch.setattr(kernels, "step", counted)
    launches = []
    for net, fused in zip(nets, (None, False), strict=True):
        # a ridge at which rounding does not decide about edges: statistics of a few steps are singular
        optimizer = SONew(
            net, lr=0.01, start_preconditioning_step=2, fused=fused, preconditioner_eps=0.1, relative_eps=relative_eps
        )
        for batch in inputs:
            optimizer.zero_grad()
            net(batch).square().sum().backward()
            optimizer.step()
        launches.append(counted.launches)
    # five steps, and four lengths of chains: 18 of the convolution, 48, 3, and 5
    assert launches == [5 * 4, 5 * 4]
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6 if dtype == torch.float32 else 4e-3)


@runs_here
@pytest.mark.skipif(not INTERPRETED, reason="both kinds take arrays of a CPU only there")
def test_parameters_of_both_kinds(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in float64 have no kernel: they go another way in the same step."""
    kinds = []
    join = Work.join
    monkeypatch.setattr(
        Work, "join", lambda self, together, *rest: (kinds.append(type(together)), join(self, together, *rest))
    )
    parameters = [nn.Parameter(torch.randn(4, 5, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    optimizer = SONew(parameters, start_preconditioning_step=1)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert kernels.DeviceRuns in kinds and set(kinds) <= {kernels.DeviceRuns, HostRuns}
    assert all(torch.isfinite(parameter).all() for parameter in parameters)
