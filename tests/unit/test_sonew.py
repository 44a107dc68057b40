"""SONew as an optimizer: golden trajectories, the same under any chain layout, AdamW before it starts, faults."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_soo import SONew
from lightning_soo.linalg import banded
from lightning_soo.placement.chains import Halos, chain_length, cut_chains, extended
from lightning_soo.placement.layout import FragmentTable
from lightning_soo.preconditioners import tridiagonal

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "sonew.npz")


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("bandwidth", [1, 4])
def test_golden_trajectory(bandwidth: int, fused: bool | None) -> None:
    name = f"traj_b{bandwidth}_"
    parameter = nn.Parameter(torch.from_numpy(GOLDEN[name + "p0"].copy()).view(5, 7))
    optimizer = SONew(
        [parameter],
        lr=1e-2,
        betas=(0.9, 0.99),
        eps=1e-8,
        bandwidth=bandwidth,
        chain="flat",
        gamma=1e-12,
        preconditioner_eps=1e-8,
        relative_eps=False,
        start_preconditioning_step=1,
        fused=fused,
    )
    for gradient, expected in zip(GOLDEN[name + "grads"], GOLDEN[name + "params"], strict=True):
        parameter.grad = torch.from_numpy(gradient.copy()).view(5, 7)
        optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy().reshape(-1), expected, atol=1e-8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(48, 5)
        self.scale, self.unused = nn.Parameter(torch.ones(())), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.convolution(x).tanh().flatten(1)) * self.scale


def train(optimizer: torch.optim.Optimizer, net: nn.Module, first: int, last: int, factor: float = 1.0) -> None:
    dtype = next(net.parameters()).dtype
    for step in range(first, last):
        x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        (net(x).float() - x.float().flatten(1)[:, :5]).square().mean().mul(factor).backward()
        optimizer.step()


def parameters(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().reshape(-1) for p in net.parameters()])


def test_until_it_starts_it_is_adamw() -> None:
    net = Net().double()
    other = copy.deepcopy(net)
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    train(SONew(net, start_preconditioning_step=1000, **settings), net, 0, 20)
    train(torch.optim.AdamW(other.parameters(), **settings), other, 0, 20)
    torch.testing.assert_close(parameters(net), parameters(other), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bandwidth", [0, 1, 3])
def test_a_saved_run_goes_on_bit_for_bit(bandwidth: int) -> None:
    def make() -> tuple[Net, SONew]:
        net = Net().to(memory_format=torch.channels_last)
        return net, SONew(net, bandwidth=bandwidth, start_preconditioning_step=4)

    whole, optimizer = make()
    train(optimizer, whole, 0, 9)
    saved = copy.deepcopy({"net": whole.state_dict(), "optimizer": optimizer.state_dict()})
    train(optimizer, whole, 9, 16)
    resumed, again = make()
    resumed.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, 9, 16)
    assert torch.equal(parameters(whole), parameters(resumed))


@pytest.mark.parametrize("factor", [1e20, 1e-18])
def test_the_size_of_gradients_does_not_matter(factor: float) -> None:
    nets = [Net(), Net()]
    for net, scale in zip(nets, (1.0, factor), strict=True):
        train(SONew(net, lr=0.01, eps=0.0, start_preconditioning_step=4), net, 0, 15, scale)
    assert torch.isfinite(parameters(nets[1])).all()
    moved = (parameters(nets[0]) - parameters(Net())).abs().max()
    assert (parameters(nets[0]) - parameters(nets[1])).abs().max() < 1e-2 * moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics_dtype", [None, "bfloat16"])
def test_half_precision_parameters(statistics_dtype: str | None, dtype: torch.dtype) -> None:
    net, reference = Net().to(dtype), Net()
    optimizer = SONew(net, lr=0.01, statistics_dtype=statistics_dtype, start_preconditioning_step=4)
    train(optimizer, net, 0, 30)
    train(SONew(reference, lr=0.01, start_preconditioning_step=4), reference, 0, 30)
    bands = optimizer.state[net.linear.weight]["band_1"]
    assert bands.dtype == (torch.bfloat16 if statistics_dtype else torch.float32)
    moved = (parameters(reference) - parameters(Net())).norm()
    assert (parameters(net) - parameters(reference)).norm() < 0.5 * moved
    saved = copy.deepcopy(optimizer.state_dict())
    again = SONew(net, lr=0.01, statistics_dtype=statistics_dtype, start_preconditioning_step=4)
    again.load_state_dict(saved)
    assert torch.equal(again.state[net.linear.weight]["band_1"], bands)


def test_state_and_table() -> None:
    net = Net()
    optimizer = SONew(net, bandwidth=2, overrides=[{"match": "convolution", "method": "none"}])
    table = optimizer.plan_table()
    assert "chains of 48" in table and "override: none" in table and "one element" in table
    train(optimizer, net, 0, 2)
    elements = {name: value.numel() for name, value in optimizer.state[net.linear.weight].items()}
    assert elements == {"step": 1, "exp_avg": 240, "band_0": 240, "band_1": 240, "band_2": 240}
    for options, message in (
        ({"bandwidth": -1}, "bandwidth=-1"),
        ({"chain": "rows"}, "did you mean 'row'"),
        ({"gamma": 1.0}, "gamma=1.0"),
        ({"statistics_dtype": "bfloat"}, "statistics_dtype='bfloat'; did you mean 'bfloat16'"),
        ({"overrides": [{"match": "linear", "merge_dims": "none"}]}, "'linear': 'merge_dims' does not apply to chains"),
    ):
        with pytest.raises(ValueError, match=message):
            SONew(net, **options)
    with pytest.raises(TypeError, match="did you mean 'bandwidth'"):
        SONew(net, bandwith=1)


def test_halos_by_bookkeeping() -> None:
    """Every neighbour within reach in the same chain arrives exactly once, whoever holds it."""
    assert chain_length((6, 3, 2), "row") == 6 and chain_length((6, 3, 2), "flat") == 36
    edges = [0, 4, 5, 6, 6, 17, 36]
    ranges = list(itertools.pairwise(edges))
    table = FragmentTable(ranges=tuple((span,) for span in ranges), shard=tuple(range(6)), replica=(0,) * 6)
    for length in (9, 36):
        reach = banded.halo(3)
        halos = Halos.plan(table, [length], [0], reach)
        assert [chain for _, chain in halos.cut] == cut_chains(ranges, length)
        arriving = []
        for place, (start, stop) in enumerate(ranges):
            got = [e for row in halos.strips for strip in row[place] for e in range(strip.start, strip.stop)]
            wanted = {
                e
                for e in range(36)
                if not start <= e < stop
                and any(-reach[0] <= e - own <= reach[1] and e // length == own // length for own in range(start, stop))
            }
            assert len(got) == len(set(got)) and set(got) == wanted
            arriving.append(len(wanted))
            begin, end = extended(start, stop, length, reach)
            assert wanted | set(range(start, stop)) == set(range(begin, end))
        sent = [sum(strip.stop - strip.start for strips in row for strip in strips) for row in halos.strips]
        assert halos.elements == max(arriving + sent)


def test_compiled_equals_uncompiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And without a working compiler it says so once and runs."""
    nets = [Net(), Net()]
    train(SONew(nets[0], lr=0.01, start_preconditioning_step=2, fused=False), nets[0], 0, 8)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    tridiagonal.compiler_works.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", refuse)
        train(SONew(nets[1], lr=0.01, start_preconditioning_step=2, compiled=True), nets[1], 0, 8)
    assert torch.equal(parameters(nets[0]), parameters(nets[1])) and caplog.text.count("no compiler") == 1
    tridiagonal.compiler_works.cache_clear()
    if not tridiagonal.compiler_works():
        pytest.skip("no C++ compiler")
    compiled = Net()
    train(SONew(compiled, lr=0.01, start_preconditioning_step=2, compiled=True), compiled, 0, 8)
    torch.testing.assert_close(parameters(compiled), parameters(nets[0]), rtol=1e-3, atol=1e-5)
