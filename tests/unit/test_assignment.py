"""Loads against exhaustive search and hand counts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_soo.placement.assignment import TOLERANCE, assign, assign_both, assign_near, smallest_largest_load

costs_of_few = st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0, 0.5]), min_size=1, max_size=8)


def largest(costs: list[float], owners: list[int], bins: int, loads: list[float] | None = None) -> float:
    found = list(loads or [0.0] * bins)
    for cost, owner in zip(costs, owners, strict=True):
        found[owner] += cost
    return max(found)


@given(costs_of_few, st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_the_bound_is_below_the_best_of_all(costs: list[float], bins: int) -> None:
    best = min(largest(costs, list(owners), bins) for owners in itertools.product(range(bins), repeat=len(costs)))
    bound = smallest_largest_load(costs, bins)
    assert sum(costs) / bins - 1e-9 <= bound <= best + 1e-9


@pytest.mark.parametrize(
    ("costs", "bins", "bound"),
    [
        ([2.0] * 5, 4, 4.0),  # one bin has two
        ([7.0, 1.0, 1.0], 3, 7.0),  # the costliest item
        ([1.0] * 9, 4, 3.0),  # three of nine
        ([3.0] * 3 + [2.0] * 3, 2, 8.0),  # half is 7.5; sums of threes and twos are 7 and 8
        ([4.0, 4.0, 4.0, 1.0], 2, 8.0),  # two of the three fours
        ([1.0] * 4 + [1.01] * 5, 4, 3.0),  # three of nine
        ([2.0] * 4 + [1.01] * 2 + [1.0], 2, 6.0),  # half is 5.51, and 5.01 and 6 are what twos and ones add up to
        ([], 3, 0.0),
    ],
)
def test_the_bound_by_hand(costs: list[float], bins: int, bound: float) -> None:
    assert smallest_largest_load(costs, bins) == pytest.approx(bound, rel=1e-8)


def test_bins_that_carry_something() -> None:
    assert smallest_largest_load([1.0, 1.0], 2, [6.0, 0.0]) == 6.0
    assert assign_near([1.0, 1.0], [[0], [0]], 2, [6.0, 0.0]) == [1, 1]


many_costs = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)


@given(many_costs, st.integers(1, 20), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_what_is_near_never_costs_balance(costs: list[float], bins: int, random) -> None:  # type: ignore[no-untyped-def]
    preferred = [sorted(random.sample(range(bins), random.randint(0, bins))) for _ in costs]
    plain = largest(costs, assign(costs, bins), bins)
    limit = max(plain, TOLERANCE * smallest_largest_load(costs, bins)) * (1 + 1e-9)
    owners = assign_near(costs, preferred, bins)
    assert largest(costs, owners, bins) <= limit
    assert owners == assign_near(list(costs), [list(near) for near in preferred], bins)  # the same on every rank
    others = [random.random() for _ in costs]
    assert largest(costs, assign_both(costs, others, bins, None), bins) <= limit


@given(many_costs, st.integers(2, 20))
@settings(max_examples=50, deadline=None)
def test_one_may_not_leave(costs: list[float], bins: int) -> None:
    preferred = [[index % bins] for index in range(len(costs))]
    assert assign_near(costs, preferred, bins, tolerance=float("inf")) == [index % bins for index in range(len(costs))]


def test_the_other_load_is_spread_too() -> None:
    """Sixteen items that cost the same, four of them dear in the other measure: one of those to each bin."""
    costs, others = [1.0] * 16, [9.0] * 4 + [1.0] * 12
    owners = assign_both(costs, others, 4, None)
    assert [owners.count(index) for index in range(4)] == [4] * 4
    assert largest(others, owners, 4) == 12.0


def test_items_are_exchanged_where_none_can_move() -> None:
    """9 + 5 against 7 + 7 is 14 + 14; preferences bring 9 + 7 against 7 + 5 first, which is 16 + 12."""
    owners = assign_near([9.0, 7.0, 7.0, 5.0], [[0], [0], [1], [1]], 2)
    assert largest([9.0, 7.0, 7.0, 5.0], owners, 2) == 14.0
