"""Equal blocks that are preconditioned together: the same numbers, held once, saved apart."""

from __future__ import annotations

import copy
import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_soo import SOAP, Shampoo
from lightning_soo.optim import stacking
from lightning_soo.placement.boxes import tiled
from lightning_soo.preconditioners import stacks

sys.path.insert(0, str(Path(__file__).parent))
from reference_shampoo import ReferenceShampoo

COUNT, STEPS, SHAPE = 4, 16, (6, 4)
OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "betas": (0.9, 0.99),
    "precondition_frequency": 3,
    "start_preconditioning_step": 2,
}
PLAIN: dict[str, Any] = {"workers": "inline", "refresh_delay": 0, "stagger": False}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks of every product of a stack from now on."""
    found: list[int] = []
    precondition = stacks.Stack.precondition

    def count(self: stacks.Stack, *arguments: Any) -> torch.Tensor:
        found.append(len(self.blocks))
        return precondition(self, *arguments)

    monkeypatch.setattr(stacks.Stack, "precondition", count)
    return found


def test_each_matrix_moves_as_the_formulas_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together while all of them move, one after the other in steps in which one of them stands still."""
    found = counted(monkeypatch)
    generator = np.random.default_rng(0)
    starts, targets = generator.standard_normal((2, COUNT, *SHAPE))
    noise = generator.standard_normal((STEPS, COUNT, *SHAPE))
    references = [ReferenceShampoo(start.copy(), **OPTIONS) for start in starts]
    parameters = [nn.Parameter(torch.from_numpy(start.copy())) for start in starts]
    optimizer = Shampoo(parameters, **OPTIONS, **PLAIN)
    for step in range(STEPS):
        for number, (reference, parameter, target) in enumerate(zip(references, parameters, targets, strict=True)):
            reference.step(reference.x - target + noise[step, number])
            parameter.grad = parameter.detach() - torch.from_numpy(target) + torch.from_numpy(noise[step, number])
        optimizer.step()
        for reference, parameter, start in zip(references, parameters, starts, strict=True):
            assert np.abs(parameter.detach().numpy() - reference.x).max() <= 1e-6 * np.abs(reference.x - start).max()
    assert found == [COUNT] * (STEPS - 1)  # the first step has no roots yet
    still = parameters[1].detach().clone()
    parameters[1].grad = None
    optimizer.step()
    assert torch.equal(parameters[1], still) and len(found) == STEPS - 1


def mlp() -> nn.Module:
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)), nn.Linear(24, 40))


def convolutions() -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)), nn.Flatten(), nn.Linear(96, 24))


def train(optimizer: Any, net: nn.Module, steps: range, skipped: tuple[int, ...] = ()) -> None:
    inputs = (6, 4, 4) if isinstance(net[0], nn.Conv2d) else (24,)
    for step in steps:
        x = torch.randn(8, *inputs, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        net(x).sin().square().mean().backward()
        if step in skipped:
            net[1].weight.grad = None
        optimizer.step()


@pytest.mark.parametrize("kind", [Shampoo, SOAP])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mlp, {"max_preconditioner_dim": 8}),  # many tiles of one parameter
        (mlp, {"max_preconditioner_dim": 12, "max_factor_dim": 5}),  # several matrices along each diagonal
        (mlp, {"precondition_1d": True, "compute_dtype": "bfloat16"}),
        (mlp, {"one_sided_above": 30, "stagger": True, "refresh_delay": 1}),
        (convolutions, {"merge_dims": "none"}),  # four dimensions, two of them cut
    ],
)
def test_together_as_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, kind: type, make: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    found = counted(monkeypatch)
    ends, products = [], []
    for together in (True, False):
        monkeypatch.setattr(stacking, "gains_by_stacking", lambda block, together=together: together)
        net = _fresh(make)
        optimizer = kind(net, **{**OPTIONS, **PLAIN, **options})
        train(optimizer, net, range(12), skipped=(5, 6))
        ends.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
        products.append(len(found))
    assert products[0] >= 3 and products[1] == products[0]
    moved = (ends[0] - torch.cat([p.detach().flatten() for p in _fresh(make).parameters()])).abs().max()
    assert (ends[0] - ends[1]).abs().max() <= 1e-7 * moved


def _fresh(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64, in which rounding does not grow to anything in some steps."""
    torch.manual_seed(0)
    return make().double()


@pytest.mark.parametrize("kind", [Shampoo, SOAP])
def test_state_is_held_once_and_saved_apart(kind: type) -> None:
    net = _fresh(mlp)
    optimizer = kind(net, **OPTIONS, **PLAIN, max_preconditioner_dim=8)
    train(optimizer, net, range(8))
    blocks = [block for member in optimizer._members for block in member.blocks]
    tensors = [tensor for block in blocks for tensor in block.working_state()[0]]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    statistics = sum(matrix.nbytes for block in blocks for matrix in block.statistics.matrices)
    assert len(held) < len(tensors) / 4 and sum(held.values()) + statistics == optimizer.state_bytes()

    saved = optimizer.state_dict()["second_order"]["blocks"]
    for entry in saved.values():
        assert all(root.untyped_storage().nbytes() == root.nbytes for root in entry["roots"])
    before = {key: [root.clone() for root in entry["roots"]] for key, entry in saved.items()}
    train(optimizer, net, range(8, 12))  # with refreshes, which are copied into the stacks
    assert all(map(torch.equal, itertools.chain(*before.values()), (r for e in saved.values() for r in e["roots"])))


@pytest.mark.parametrize("kind", [Shampoo, SOAP])
@pytest.mark.parametrize("how", ["load", "copy"])
def test_it_goes_on_with_the_same_bits(kind: type, how: str) -> None:
    net = _fresh(mlp)
    optimizer = kind(net, **OPTIONS, **PLAIN)
    train(optimizer, net, range(8))
    if how == "copy":
        other, resumed = copy.deepcopy((net, optimizer))
    else:
        other = copy.deepcopy(net)
        resumed = kind(other, **OPTIONS, **PLAIN)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    for one, of in ((optimizer, net), (resumed, other)):
        train(one, of, range(8, 14))
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_boxes_that_tile_a_box() -> None:
    def box(*corner: int) -> tuple[tuple[int, int], ...]:
        return tuple((start, start + size) for start, size in zip(corner, (2, 3), strict=True))

    grid = [box(row, column) for row in (4, 6) for column in (3, 6, 9)]
    assert tiled(grid) == (((4, 8), (3, 12)), (2, 3))
    assert tiled(grid[:3]) == (((4, 6), (3, 12)), (1, 3)) and tiled(grid[:1]) == (grid[0], (1, 1))
    assert tiled(grid[:5]) is None and tiled([grid[0], grid[2]]) is None  # a hole
    assert tiled([box(0, 0), box(3, 0)]) is None  # a gap of half a box
    assert tiled([box(0, 0), box(2, 3)]) is None  # a diagonal
