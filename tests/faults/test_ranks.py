"""Rows 12 to 19 of the faults: ranks. One world of three; each test reads what its ranks saw."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from launching import torchrun

RANKS = 3
World = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Row -> what each rank found."""
    out = tmp_path_factory.mktemp("ranks")
    torchrun(Path(__file__).parent / "worker_ranks.py", RANKS, out)
    found = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    return {row: [results[row] for results in found] for row in found[0]}


def ranks_of(world: World, row: str) -> list[dict[str, Any]]:
    for rank, found in enumerate(world[row]):
        assert "raised" not in found, f"rank {rank}: {found['raised']}"
    return world[row]


def the_same(values: list[Any]) -> Any:
    """What all ranks have found."""
    assert all(value == values[0] for value in values), values
    return values[0]


def test_row_12_no_gradient_on_some_ranks(world: World) -> None:
    """Zero rows where one rank has no gradient, no examples where a module did not run: as in one process."""
    found = ranks_of(world, "12")
    assert [each["rows"] for each in found] == [3, 3, 1]
    for each in found:
        assert each["fsdp2"] <= 1e-9 and each["kfac"] <= 1e-9
        assert each["effect"] > 1e-3  # of the missing gradients


@pytest.mark.parametrize(
    ("case", "other", "own"),
    [
        ("delay", "refresh_delay=2", "refresh_delay=3"),
        ("nested", "workers.deadline=5", "workers.deadline=6"),
        ("interval", "precondition_frequency.growth=2", "precondition_frequency.growth=3"),
        ("override", "overrides[0].match='2.weight'", "overrides[0].match='0.weight'"),
        ("group", "lr=0.1 of parameter group 0", "lr=0.2 of parameter group 0"),
        ("method", "method='soap'", "method='shampoo'"),
        ("trust region", "max_radius=5.0", "max_radius=6.0"),
    ],
)
def test_row_13_another_configuration_on_one_rank(world: World, case: str, other: str, own: str) -> None:
    kind, text = the_same([each[case] for each in ranks_of(world, "13")])
    assert kind == "AgreementError"
    assert text == f"the configuration of rank [1] differs from rank 0's: {other} on rank 1, {own} on rank 0"


def test_row_14_a_root_fails_on_one_rank(world: World) -> None:
    """Started at step 8, due at step 10: until the next one, due at 14, all keep the root of step 6."""
    found = ranks_of(world, "14")
    history = the_same([each["history"] for each in found])
    roots, failures, steps = zip(*history, strict=True)
    assert steps == tuple(range(1, 17))
    changes = [step for step in range(1, 16) if roots[step] != roots[step - 1]]
    assert [step + 1 for step in changes] == [6, 14]
    assert [step for step, count in zip(steps, failures, strict=True) if count] == [10, 11, 12, 13]
    assert max(failures) == 1
    the_same([each["parameters"] for each in found])
    for each in found:
        assert each["failures alone"] == list(failures)
        assert each["error"] <= 1e-9 < 1e-4 < each["effect"]


@pytest.mark.parametrize("method", ["shampoo", "soap", "sonew", "kfac"])
def test_row_15_a_gradient_scaler_skips(world: World, method: str) -> None:
    """Bit for bit the run without a scaler that never saw the batch with the overflow, on all ranks."""
    found = the_same([each[method] for each in ranks_of(world, "15")])
    assert found["scaled"]["bits"] == found["plain"]["bits"]
    assert found["scaled"]["steps"] == found["plain"]["steps"] == 9
    assert found["scaled"]["scale"] == 2.0**9 and found["plain"]["scale"] == 1.0


def test_row_16_shards_that_are_uneven_or_empty(world: World) -> None:
    found = ranks_of(world, "16")
    assert [each["elements"] for each in found] == [4, 4, 0] and the_same([each["blocks"] for each in found]) == 1
    assert [each["rows"]["tokens.weight"] for each in found] == [8, 8, 7]
    assert [each["rows"]["gain"] for each in found] == [1, 0, 0]
    for each in found:
        assert each["one block"] <= 1e-9 and each["model"] <= 1e-9


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_row_17_a_slow_rank(world: World, engine: str) -> None:
    """It changes no bits."""
    found = ranks_of(world, "17")
    assert the_same([each[f"{engine} slow"] for each in found]) == the_same(
        [each[f"{engine} undisturbed"] for each in found]
    )


def test_row_18_a_wait_ends_and_says_what_for(world: World) -> None:
    """Every rank that waits is told the operation, the step, and who is not there."""
    found = ranks_of(world, "18")
    for rank in (0, 2):
        kind, text = found[rank]["asleep"]
        assert kind == "TransportError" and text.startswith(
            f"rank {rank}: the flags of step 4 (all_reduce among 3 ranks) not answered in 2 s; "
            "rank [1] has not come to it"
        ), text
        assert 2.0 <= found[rank]["seconds"] < 10.0  # of a group that would wait ten
        kind, text = found[rank]["root"]
        assert kind == "TransportError" and text.startswith(
            f"rank {rank}: the roots of step 4 (broadcast among 3 ranks) not answered in 2 s; "
            "rank [1] has not come to it"
        ), text
        kind, text = found[rank]["of the group"]  # by its timeout here, or by gloo's own
        assert kind == "TransportError" and re.match(
            rf"rank {rank}: the flags of step 1 \(all_reduce among 3 ranks\) "
            r"(not answered in 2 s|failed \(.*\)); rank \[1\] has not come to it",
            text,
        ), text
    for rank in (0, 1):
        kind, text = found[rank]["elsewhere"]
        assert kind == "TransportError" and (
            "rank 2 waits for the flags of step 1 (all_reduce among 3 ranks) in another process group" in text
        ), text
        assert "has not come" not in text, text


def test_row_18_a_rank_that_has_gone(world: World) -> None:
    for rank in (0, 1):
        kind, text = ranks_of(world, "gone")[rank]["text"]
        assert kind == "TransportError" and text.startswith(
            f"rank {rank}: the flags of step 3 (all_reduce among 3 ranks) failed ("
        ), text
        assert "; rank [2] has not come to it" in text, text


def test_row_18_a_bound_costs_a_step_nothing(world: World) -> None:
    """One small all_reduce a step as before, one wait for each collective; a note is written only where one is late."""
    for found in ranks_of(world, "18"):
        assert found["calls"] == {"all_reduce": 3}
        assert found["in time"] == {"waits": [1, 1, 1], "written": []}
        assert found["late"]["waits"] == [2, 2, 2] and set(found["late"]["written"]) == {"the roots"}


def test_row_18_timeouts_that_do_not_go_together(world: World) -> None:
    """The process group's is the longest; workers' deadline is below a third, by itself where it was left open."""
    for found in ranks_of(world, "18"):
        (kind, longest), (other, third) = found["refused"]
        assert kind == other == "ValueError"
        assert longest.startswith("collective_timeout=3000: the process group itself gives up after 30 s")
        assert third.startswith("collective_timeout is 20 s and the workers' deadline 7 s")
        assert found["deadline"] == 5.0


def test_row_19_sizes_differ_on_one_rank(world: World) -> None:
    """Found before anything is sent: when the plan is made, when a group is added, in a buffer of another size."""
    found = ranks_of(world, "19")
    for case, rank, name, sizes in (("attach", 1, "0.weight", (5, 4)), ("later", 2, "extra", (6, 5))):
        kind, text = the_same([each[case] for each in found])
        assert kind == "AgreementError"
        for size, where in zip(sizes, (rank, 0), strict=True):
            assert f"parameter {name!r} of shape ({size}, 4), torch.float64, part 0 on rank {where}" in text
    for rank, each in enumerate(found):
        assert each["exchange"] == [
            "TransportError",
            f"rank {rank}: the statistics (all_to_all among 3 ranks): {rank + 5} elements to send, the plan says 3",
        ]
        assert each["broadcast"] == [
            "TransportError",
            f"rank {rank}: the roots (broadcast among 3 ranks): {4 * (rank + 5)} bytes to send, the plan says 9",
        ]
        assert each["calls"] == {}
