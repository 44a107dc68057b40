from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_soo.placement.assignment import assign
from lightning_soo.placement.blocks import BlockRules, merge_shape, partition
from lightning_soo.placement.build import build_plan
from lightning_soo.placement.overrides import Override, ParameterSpec
from lightning_soo.placement.table import plan_table

shapes = st.lists(st.integers(1, 14), min_size=1, max_size=4).map(tuple)


@given(shapes, st.integers(3, 16), st.sampled_from(["none", "kernel", "all"]))
@settings(max_examples=200, deadline=None)
def test_every_element_is_in_one_block(shape: tuple[int, ...], limit: int, merge: str) -> None:
    rules = BlockRules(max_preconditioner_dim=limit, merge_dims=merge, precondition_1d=True, one_sided_above=10**6)
    blocks, reason = partition("p", shape, rules)
    assert bool(blocks) != bool(reason)
    if blocks:
        assert sum(math.prod(block.shape) for block in blocks) == math.prod(shape)
        assert len({block.key for block in blocks}) == len(blocks)
        assert all(order <= limit for block in blocks for order in block.orders)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60), st.integers(1, 1024))
@settings(max_examples=200, deadline=None)
def test_balance_against_its_lower_bound(costs: list[float], ranks: int) -> None:
    owners = assign(costs, ranks)
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    largest = sorted(costs, reverse=True)
    pair = largest[ranks - 1] + largest[ranks] if len(costs) > ranks else 0.0
    bound = max(sum(costs) / ranks, largest[0], pair)
    assert max(loads) <= (4 / 3) * bound * (1 + 1e-9) or max(loads) <= sum(costs) / ranks + largest[0]


@pytest.mark.parametrize("ranks", [1, 2, 7, 64, 1024])
def test_blocks_do_not_depend_on_ranks(ranks: int) -> None:
    specs = [ParameterSpec(name=f"layers.{i}.weight", shape=(384, 1536)) for i in range(12)]
    rules = BlockRules()
    alone, plan = build_plan(specs, rules), build_plan(specs, rules, ranks=ranks)
    assert [unit.key for unit in plan.units] == [unit.key for unit in alone.units]
    assert all(0 <= unit.refresher < ranks for unit in plan.units)
    assert plan.digest() == build_plan(specs, rules, ranks=ranks).digest()


@pytest.mark.parametrize(
    ("shape", "merge", "expected"),
    [
        ((8, 3, 5, 5), "kernel", (8, 75)),
        ((64, 1, 400), "kernel", (64, 1, 400)),  # of raw audio: a dimension of size one has no matrix
        ((8, 96, 128), "kernel", (8, 96, 128)),  # experts
        ((3, 2, 4), "all", (3, 8)),
        ((1, 6), "all", (6,)),
        ((7, 5), "all", (7, 5)),
    ],
)
def test_merge(shape: tuple[int, ...], merge: str, expected: tuple[int, ...]) -> None:
    assert merge_shape(shape, merge, 8) == expected


def test_tall_and_embedding_are_one_sided() -> None:
    tall, _ = partition("head", (50000, 64), BlockRules())
    embedding, _ = partition("tokens", (4096, 64), BlockRules(is_embedding=True))
    assert [block.dims for block in tall + embedding] == [(1,), (1,)]


def test_layers_with_other_factors_have_a_row_of_their_own() -> None:
    specs = [ParameterSpec(name=f"layers.{index}.weight", shape=(64, 64)) for index in range(4)]
    smaller = Override.from_mapping({"match": r"layers\.2", "max_factor_dim": 16})
    table = plan_table(build_plan(specs, BlockRules(), overrides=[smaller]), engine="single", method="m", graft="g")
    rows = [line for line in table.splitlines() if line.startswith("layers.")]
    assert len(rows) == 2 and [("factors of 16" in row, "(3)" in row) for row in rows] == [(False, True), (True, False)]


def test_table_says_which_side_is_diagonal() -> None:
    specs = [
        ParameterSpec(name="embed", shape=(100, 4), module_classes=("Embedding",)),
        ParameterSpec(name="w", shape=(4, 4)),
    ]
    plan = build_plan(specs, BlockRules())
    table = plan_table(plan, engine="e", method="m", graft="g", has_diagonal_rows=lambda block: block.has_free_rows)
    embed, weight = (next(line for line in table.splitlines() if line.startswith(name)) for name in ("embed", "w "))
    assert "1 of 100x4 dims (1,), diagonal rows" in embed and "diagonal" not in weight


def test_overrides() -> None:
    specs = [
        ParameterSpec(name="embed.weight", shape=(10, 4), module_classes=("Embedding",)),
        ParameterSpec(name="lm_head.weight", shape=(10, 4), module_classes=("Linear",)),
    ]
    none = Override.from_mapping({"match": "Linear", "method": "none"})
    plan = build_plan(specs, BlockRules(), overrides=[none])
    assert [bool(p.units) for p in plan.parameters] == [True, False]
    with pytest.raises(ValueError, match=r"did you mean 'lm_head\.weight'"):
        build_plan(specs, BlockRules(), overrides=[Override.from_mapping({"match": "lm_heat.weight"})])
    with pytest.raises(ValueError, match="max_preconditioner_dim"):
        Override.from_mapping({"match": "x", "max_preconditioner_dims": 3})
    for entry, said in (
        ({"max_factor_dim": 0}, r"match='x': max_factor_dim=0: must be a whole number of at least 1, or None"),
        ({"max_preconditioner_dim": None}, "max_preconditioner_dim=None: must be a whole number of at least 1$"),
        ({"one_sided_above": 2.5}, r"one_sided_above=2\.5"),
        ({"merge_dims": "kernels"}, "match='x': merge_dims='kernels'; did you mean 'kernel'"),
        ({"method": "shampo"}, "match='x': method='shampo'; did you mean 'shampoo'"),
    ):
        with pytest.raises(ValueError, match=said):
            Override.from_mapping({"match": "x", **entry})
