"""Rows that have no matrix: their diagonal preconditioner, against numpy and against itself in one piece."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_soo import SOAP, Shampoo
from lightning_soo.placement.blocks import BlockRules, partition
from lightning_soo.placement.fragments import Fragment
from lightning_soo.placement.layout import FragmentTable
from lightning_soo.preconditioners.diagonal_rows import DiagonalRows

ROWS, COLUMNS, EPS = 12, 4, 1e-8


def gradients(steps: int) -> torch.Tensor:
    """Of an embedding: rows that are frequent, rare (ten thousand times smaller) and never used."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.logspace(0, -4, ROWS, dtype=torch.float64).unsqueeze(1)
    frequency[5] = 0.0
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    return torch.randn(steps, ROWS, COLUMNS, generator=generator, dtype=torch.float64) @ mixing * frequency


def last_step(kind: type[Shampoo] | type[SOAP], steps: torch.Tensor, **options: Any) -> np.ndarray:
    """What the last of the steps moves, with roots of that step."""
    table = nn.Embedding.from_pretrained(torch.zeros(ROWS, COLUMNS, dtype=torch.float64), freeze=False)
    given = {"lr": 1.0, "betas": (0.9, 0.95), "precondition_frequency": 1, "start_preconditioning_step": 1}
    optimizer = kind(table, **{**given, "refresh_delay": 0, **options})
    for gradient in steps:
        before = table.weight.detach().clone()
        table.weight.grad = gradient.clone()
        optimizer.step()
    return (before - table.weight.detach()).numpy()


def expected_step(steps: torch.Tensor, rows: float, columns: float) -> np.ndarray:
    """By numpy: ``L^(-1/rows) M R^(-1/columns)`` with the size of Adam's step."""
    mean, second, statistic = np.zeros((ROWS, COLUMNS)), np.zeros((ROWS, COLUMNS)), np.zeros((COLUMNS, COLUMNS))
    for gradient in steps.numpy():
        mean = 0.9 * mean + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        statistic = 0.95 * statistic + 0.05 * gradient.T @ gradient
    count = len(steps)
    adam = (mean / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.95**count)) + EPS)
    values, vectors = np.linalg.eigh(statistic / (1 - 0.95**count))
    root = (vectors * (values + 1e-6 * values[-1]) ** (-1 / columns)) @ vectors.T
    left = np.diag((second.mean(axis=1) + EPS**2) ** (-1 / rows))
    direction = left @ mean @ root
    return direction * np.linalg.norm(adam) / np.linalg.norm(direction)


@pytest.mark.parametrize(("exponent", "p"), [(2.5, 2.5), ("2k", 4.0), (3, 3.0)])
def test_rows_are_a_side(exponent: float | str, p: float) -> None:
    steps = gradients(6)
    found = last_step(Shampoo, steps, exponent_override=exponent)
    expected = expected_step(steps, p, p)
    assert np.abs(found - expected).max() <= 1e-9 * np.abs(expected).max()
    assert not found[5].any()
    # without it rare rows hardly move
    plain = last_step(Shampoo, steps, exponent_override=exponent, diagonal_rows=False)
    one_sided = expected_step(steps, np.inf, 2.0 if exponent == "2k" else p)
    assert np.abs(plain - one_sided).max() <= 1e-9 * np.abs(one_sided).max()
    assert np.linalg.norm(plain[-1]) < 0.02 * np.linalg.norm(found[-1])


def test_the_exponent_by_signal_counts_the_rows() -> None:
    """2.5 for gradients that have nothing in common, 4 for equal ones: of two sides."""
    for steps, p in (
        (gradients(1).expand(6, -1, -1), 4.0),
        (gradients(1) * torch.tensor([1.0, -1.0] * 12)[:, None, None], 2.5),
    ):
        table = nn.Embedding(ROWS, COLUMNS).double()
        optimizer = Shampoo(table, lr=0.1, betas=(0.9, 0.95), start_preconditioning_step=2, statistics_frequency=1)
        for gradient in steps:
            table.weight.grad = gradient.clone()
            optimizer.step()
        (block,) = [block for member in optimizer._members for block in member.blocks]
        assert block.root_exponent == pytest.approx(p, abs=0.05)
        optimizer.close()


@pytest.mark.parametrize("options", [{"grafting": "sgd"}, {"grafting": None, "betas": (0.0, 0.95)}])
def test_grafts_without_second_moments_leave_rows_alone(options: dict[str, Any]) -> None:
    steps = gradients(4)
    found = [last_step(Shampoo, steps, **options, diagonal_rows=given) for given in (True, False)]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("shape", "embedding", "expected"),
    [
        ((30, 4), True, True),
        ((40000, 4), False, True),
        ((30, 4), False, False),
        ((4, 40000), False, False),  # columns are in pieces under most engines
        ((40000, 40000), False, False),
        ((40000, 3, 4), False, True),
        ((40000, 1, 4), False, True),
        ((3, 40000, 4), False, False),
    ],
)
def test_which_blocks(shape: tuple[int, ...], embedding: bool, expected: bool) -> None:
    blocks, _ = partition("w", shape, BlockRules(is_embedding=embedding, merge_dims="none"))
    assert {block.has_free_rows for block in blocks} <= {expected}


@pytest.mark.parametrize(
    "edges", [[0, 48], [0, 8, 24, 48], [0, 3, 5, 30, 48], [0, 0, 1, 2, 3, 47, 48], [0, 24, 24, 48]]
)
def test_fragments_scale_as_the_whole(edges: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    moments = torch.rand(ROWS, COLUMNS, generator=generator, dtype=torch.float64) ** 4
    direction = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    expected = direction * (moments.mean(1, keepdim=True) + 1e-6) ** (-1 / 2.5)
    held = tuple(itertools.pairwise(edges))
    table = FragmentTable(ranges=tuple((r,) for r in held), shard=tuple(range(len(held))), replica=(0,) * len(held))
    cut = table.cut_rows(0, COLUMNS)
    assert cut == tuple(sorted({edge // COLUMNS for edge in edges if edge % COLUMNS}))
    rows = [
        DiagonalRows.of(
            Fragment(name="w", shape=(ROWS, COLUMNS), start=start, stop=stop, tensor=torch.empty(0)), COLUMNS, cut
        )
        for start, stop in held
    ]
    parts = [moments.view(-1)[start:stop] for start, stop in held]
    sums = sum(one.cut_sums(part, True) for one, part in zip(rows, parts, strict=True))
    assert not any(one.cut_sums(part, False).any() for one, part in zip(rows, parts, strict=True))
    found = direction.clone().view(-1)
    for one, part, (start, stop) in zip(rows, parts, held, strict=True):
        one.scale_(found[start:stop], part, sums.tolist(), exponent=2.5, eps=1e-3)
    torch.testing.assert_close(found.view(ROWS, COLUMNS), expected, rtol=1e-12, atol=0.0)


def test_half_precision_directions_do_not_overflow() -> None:
    moments = torch.full((2, 4), 1e-14)
    rows = DiagonalRows(columns=4, cut=(), whole=(0, 8), parts=())
    direction = torch.full((2, 4), 1e-3, dtype=torch.float16)
    rows.scale_(direction, moments, [], exponent=2.5, eps=1e-8)
    assert torch.isfinite(direction).all() and float(direction.max()) == pytest.approx(1e-3 * (1e-14) ** -0.4, rel=0.02)
