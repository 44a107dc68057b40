"""Boxes, fragments, exchanges and places against element-by-element bookkeeping."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_soo.placement.assignment import assign_near
from lightning_soo.placement.blocks import BlockRules
from lightning_soo.placement.boxes import decompose, flat_span, pieces, slices, volume
from lightning_soo.placement.build import build_plan
from lightning_soo.placement.exchange import Parts, Traveller, fill_buckets
from lightning_soo.placement.layout import FragmentTable
from lightning_soo.placement.overrides import ParameterSpec
from lightning_soo.placement.uncut import largest_uncut_dim

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@given(shapes, st.data())
@settings(max_examples=300, deadline=None)
def test_boxes_cover_a_run_once_and_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    flat = np.arange(numel).reshape(shape)
    boxes = decompose(shape, start, stop)
    found = [element for box in boxes for element in flat[slices(box)].reshape(-1).tolist()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(shapes, st.data())
@settings(max_examples=300, deadline=None)
def test_pieces_are_the_common_elements(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    box = []
    for size in shape:
        low = data.draw(st.integers(0, size - 1))
        box.append((low, data.draw(st.integers(low + 1, size))))
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    flat = np.arange(numel).reshape(shape)
    inside = set(flat[slices(tuple(box))].reshape(-1).tolist())
    found = [e for piece in pieces(shape, tuple(box), start, stop) for e in flat[slices(piece)].reshape(-1).tolist()]
    assert sorted(found) == sorted(inside & set(range(start, stop)))
    assert flat_span(shape, tuple(box)) == (min(inside), max(inside))
    assert volume(tuple(box)) == len(inside)


def cut_everywhere(numels: list[int], cuts: list[float], ranks: int) -> FragmentTable:
    """ZeRO's layout: parameters end to end, cut at the given fractions."""
    total = sum(numels)
    edges = [0, *sorted(round(total * cut) for cut in cuts[: ranks - 1]), total]
    starts = [0, *itertools.accumulate(numels)]
    ranges = tuple(
        tuple(
            (min(max(low - begin, 0), size), max(min(high - begin, size), min(max(low - begin, 0), size)))
            for begin, size in zip(starts, numels, strict=False)
        )
        for low, high in itertools.pairwise(edges)
    )
    return FragmentTable(ranges=ranges, shard=tuple(range(ranks)), replica=(0,) * ranks)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.integers(2, 6),
    st.integers(256, 4096),
)
@settings(max_examples=150, deadline=None)
def test_every_cut_block_arrives_whole(sizes: list[tuple[int, int]], cuts: list[float], ranks: int, limit: int) -> None:
    specs = [ParameterSpec(name=f"p{index}", shape=shape) for index, shape in enumerate(sizes)]
    table = cut_everywhere([math.prod(shape) for shape in sizes], cuts, ranks)
    plan = build_plan(specs, BlockRules(max_preconditioner_dim=16), table=table, exchange_bucket_bytes=limit)
    alone = build_plan(specs, BlockRules(max_preconditioner_dim=16))
    assert [unit.block for unit in plan.units] == [unit.block for unit in alone.units]  # blocks never depend on ranks
    buckets = [bucket for found in plan.buckets.values() for bucket in found]
    travelling = [traveller.key for bucket in buckets for traveller in bucket.travellers]
    assert sorted(travelling) == sorted(unit.key for unit in plan.units if unit.place.travels)
    for bucket in buckets:
        sent = [bucket.sent(place) for place in range(ranks)]
        assert [list(column) for column in zip(*sent, strict=True)] == [bucket.received(p) for p in range(ranks)]
        assert bucket.largest == max(max(map(sum, sent)), max(sum(bucket.received(place)) for place in range(ranks)))
        assert bucket.largest_bytes <= limit or len(bucket.travellers) == 1
        for traveller in bucket.travellers:
            unit = plan.units[traveller.unit]
            assert sum(traveller.counts.values()) == math.prod(unit.block.shape)
    for unit in plan.units:
        parameter = int(unit.block.parameter[1:])
        first, last = flat_span(unit.block.merged_shape, unit.block.ranges)
        holders = [
            r
            for r in range(ranks)
            if table.ranges[r][parameter][0] <= first < last + 1 <= table.ranges[r][parameter][1]
        ]
        assert unit.place.travels == (not holders)
        assert not holders or unit.homes == (holders[0],)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4),
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.integers(2, 6),
    st.sampled_from(["none", "kernel", "all"]),
)
@settings(max_examples=150, deadline=None)
def test_the_largest_blocks_that_nobody_cuts(
    sizes: list[tuple[int, ...]], cuts: list[float], ranks: int, merge: str
) -> None:
    """Against plans of every size."""
    specs = [ParameterSpec(name=f"p{index}", shape=shape) for index, shape in enumerate(sizes)]
    table = cut_everywhere([math.prod(shape) for shape in sizes], cuts, ranks)
    rules = BlockRules(max_preconditioner_dim=64, merge_dims=merge, precondition_1d=True)
    smaller = [replace(rules, max_preconditioner_dim=size) for size in (32, 16)]
    plans = [build_plan(specs, each, table=table) for each in smaller]
    expected = next((size for size, plan in zip((32, 16), plans, strict=True) if not any(plan.buckets.values())), None)
    assert largest_uncut_dim(specs, rules, [], table) == expected


def test_a_thousand_ranks() -> None:
    """128 x 8 ranks in seconds; refreshes and state divided, homes one per copy."""
    layers = [ParameterSpec(name=f"layers.{i}.weight", shape=(4096, 4096)) for i in range(24)]
    rows = 4096 // 8
    ranges = tuple(tuple((place * rows * 4096, (place + 1) * rows * 4096) for _ in layers) for place in range(8))
    table = FragmentTable(
        ranges=ranges * 128, shard=tuple(range(8)) * 128, replica=tuple(rank // 8 for rank in range(1024))
    )
    plan = build_plan(layers, BlockRules(max_preconditioner_dim=512), table=table)
    assert plan.exchange_bytes == 0
    assert all(len(unit.homes) == 128 and unit.refresher in unit.homes for unit in plan.units)
    assert plan.balance <= 2.0  # 1,536 equal blocks over 1,024 ranks


def test_a_near_place_is_kept_until_it_is_overloaded() -> None:
    assert assign_near([1.0] * 4, [[0], [0], [1], [1]], 2) == [0, 0, 1, 1]
    crowded = assign_near([1.0] * 8, [[0]] * 8, 4)
    assert max(map(crowded.count, range(4))) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [[2, 0, 0, 3], [2, 0, 4, 6]],
            r"'w': rank 1 holds elements \[4, 6\), but the next ones missing are \[3, ...\)",
        ),
        ([[2, 0, 0, 3], [2, 0, 3, 5]], r"'w': ranks \[0, 1\] hold 5 of its 6 elements"),
        ([[2, 0, 0, 6], [1, 1, 0, 6]], "copies of the model of different sizes"),
    ],
)
def test_a_table_that_loses_elements_is_refused(rows: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FragmentTable.from_rows(rows, {"w": (2, 3)})


def test_buckets_keep_dtypes_apart() -> None:
    def traveller(unit: int, dtype: torch.dtype) -> Traveller:
        return Traveller(
            unit=unit,
            key=str(unit),
            parameter=0,
            box=((0, 4),),
            home=0,
            dtype=dtype,
            parts=Parts({0: (((0, 2),),), 1: (((2, 4),),)}),
        )

    dtypes = [torch.float32, torch.float32, torch.bfloat16]
    buckets = fill_buckets([traveller(unit, dtype) for unit, dtype in enumerate(dtypes)], 2, 10**6)
    assert [(bucket.dtype, len(bucket.travellers)) for bucket in buckets] == [(torch.float32, 2), (torch.bfloat16, 1)]
