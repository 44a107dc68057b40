"""Plans for machines that are not here: hand counts, the balance of large models, and what is refused."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_soo import KFAC, Shampoo, SONew
from lightning_soo.cli import _parser, main
from lightning_soo.placement.overrides import ParameterSpec
from lightning_soo.placement.simulated import simulate
from lightning_soo.placement.wrapping import modules_to_shard
from lightning_soo.planning.command import make_report
from lightning_soo.planning.estimates import estimate
from lightning_soo.planning.machine import Machine, measured
from lightning_soo.planning.models import build_model, layer_classes
from lightning_soo.planning.report import Report
from lightning_soo.planning.traffic import flows
from lightning_soo.planning.waiting import Crew, Load, waits
from lightning_soo.refresh.schedule import Interval, RefreshSchedule

PLANS = Path(__file__).parent.parent.parent / "recipes" / "plans"
HERE = f"{__name__}:two_layers"


def two_layers(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.Linear(width, 2, bias=False))


def report(*arguments: str, model: str = HERE) -> Report:
    return make_report(_parser().parse_args(["plan", "--model", model, *arguments]))


@functools.cache
def llama(size: str) -> nn.Module:
    pytest.importorskip("transformers")
    return build_model(str(PLANS / f"llama3_{size}.json"))


@pytest.mark.parametrize(("size", "numel"), [("8b", 8_030_261_248), ("70b", 70_553_706_496)])
@pytest.mark.parametrize("ranks", [8, 64, 512, 1024])
def test_balance_of_large_models(size: str, numel: int, ranks: int) -> None:
    model = llama(size)
    assert sum(parameter.numel() for parameter in model.parameters()) == numel
    optimizer = Shampoo(model)
    for engine, how in {"ddp": {}, "fsdp2": {}, "hsdp": {"shard_size": 8}}.items():
        plan = optimizer.plan_elsewhere(engine, ranks, **how)
        assert plan.balance <= max(1.05, 1.05 * plan.least_balance), (engine, plan.balance, plan.least_balance)
        # no bound beyond what equal blocks explain: an order of 1024 costs as much as any other
        costs = sorted((unit.place.milliseconds for unit in plan.units), reverse=True)
        dear = costs[0] * math.ceil(sum(costs) / ranks / costs[0])
        assert plan.least_balance <= max(1.0, dear / (sum(costs) / ranks)) * 1.5
        assert all(0 <= unit.refresher < ranks for unit in plan.units)


@pytest.mark.parametrize(("name", "size"), [("8b", 2048), ("8b", 4096), ("70b", 4096)])
def test_balance_of_larger_blocks(name: str, size: int) -> None:
    optimizer = Shampoo(llama(name), max_preconditioner_dim=size, max_factor_dim=None)
    for ranks in (64, 1024):
        plan = optimizer.plan_elsewhere("fsdp2", ranks)
        assert plan.balance <= max(1.05, 1.05 * plan.least_balance)


def test_a_plan_for_elsewhere_does_not_depend_on_the_one_in_use() -> None:
    optimizer = Shampoo(nn.Sequential(*(nn.Linear(16, 16) for _ in range(8))), workers="inline")
    found = []
    for _ in range(2):
        plan = optimizer.plan_elsewhere("ddp", 4, fast_bfloat16=True)
        found.append([unit.refresher for unit in plan.units])
        optimizer.attach()
        dtypes = optimizer.compute_dtypes()
    assert found[0] == found[1] and set(found[0]) == {0, 1, 2, 3}
    optimizer.plan_elsewhere("ddp", 4, fast_bfloat16=True)
    assert optimizer.compute_dtypes() == dtypes


def test_memory_and_work_by_hand() -> None:
    """6 x 4 with a bias, and 4 x 2: orders 4 and 6, 2 and 4; moments of Adam; nothing travels on one rank."""
    found = estimate(Shampoo(two_layers()), Shampoo(two_layers()).plan_elsewhere("single", 1))
    assert {name: values.tolist() for name, values in found.memory.items()} == {
        "parameters": [4 * 36],
        "moments": [8 * 36],
        "statistics": [4 * (16 + 36 + 4 + 16)],
        "roots": [4 * (16 + 36 + 4 + 16)],
        "exchange buffers": [0],
        "scratch": [4 * 36],  # parameters as small as these advance together
    }
    assert found.statistics_flops.tolist() == found.apply_flops.tolist() == [2 * 24 * 10 + 2 * 8 * 6]
    assert found.flows == ()


def test_bytes_by_hand_under_two_shards() -> None:
    """Rows 0-1 and 2-3 of the first weight, row 0 and row 1 of the second, on two ranks; every block is cut."""
    optimizer = Shampoo(two_layers(), grafting="adam")
    plan = optimizer.plan_elsewhere("fsdp2", 2)
    assert plan.table.ranges == (((0, 12), (0, 2), (0, 4)), ((12, 24), (2, 4), (4, 8)))
    found = {(flow.purpose, flow.when): flow for flow in flows(optimizer, plan)}
    assert found["the flags", "step"].bytes.tolist() == [8 * 4] * 2
    assert found["the norms", "step"].bytes.tolist() == [8 * 4] * 2
    homes = [unit.homes[0] for unit in plan.units]
    assert sorted(homes) == [0, 1]
    for rank in (0, 1):  # the half that belongs to the block of the other rank
        there = 4 * (12 if homes[0] != rank else 4)
        assert found["the gradients of cut blocks", "statistics"].bytes[rank] == there
        assert found["the directions of cut blocks", "step"].bytes[rank] == 4 * (12 if homes[0] == rank else 4)


def test_fsdp1_flattens_units_with_alignment() -> None:
    """Float32 aligned to four elements: 3, one of padding, 6; ten and two of padding divided by three."""
    specs = [ParameterSpec(name="a.weight", shape=(3,)), ParameterSpec(name="a.bias", shape=(2, 3))]
    table = simulate("fsdp1", specs, ranks=3, units=["a"]).table
    assert table.ranges == (((0, 3), (0, 0)), ((0, 0), (0, 4)), ((0, 0), (4, 6)))


def test_zero_leaves_frozen_parameters_and_steps_in_parts() -> None:
    specs = [
        ParameterSpec(name="a", shape=(5,), dtype=torch.bfloat16),
        ParameterSpec(name="b", shape=(4,), requires_grad=False),
        ParameterSpec(name="c", shape=(7,)),
    ]
    found = simulate("zero3", specs, ranks=2, sub_group_size=3)
    assert [(spec.name, spec.part, spec.dtype) for spec in found.specs] == [
        ("a", 0, torch.float32),
        ("c", 1, torch.float32),
    ]
    assert found.table.ranges == (((0, 3), (0, 4)), ((3, 5), (4, 7)))
    # twelve elements, a multiple of two for each of two ranks
    assert simulate("zero1", specs, ranks=2).table.ranges == (((0, 5), (0, 1)), ((0, 0), (1, 7)))


def test_layers_and_chains_are_planned_too() -> None:
    sonew = SONew(two_layers())
    found = estimate(sonew, sonew.plan_elsewhere("fsdp2", 2))
    assert found.memory["statistics"].tolist() == [2 * 4 * 18] * 2  # two bands
    kfac = KFAC(two_layers())
    plan = kfac.plan_elsewhere("ddp", 4)
    assert [unit.block.orders for unit in plan.units] == [(4, 7), (2, 4)]
    factors = next(flow for flow in flows(kfac, plan) if flow.purpose == "the factors")
    assert factors.when == "statistics" and factors.bytes.max() > 0


def square_layers(count: int = 16, width: int = 1024) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


@pytest.mark.parametrize(
    ("options", "cores", "step_seconds", "ways"),
    [
        # eight blocks a rank, of 61 ms each: more than 5 steps have
        ("precondition_frequency=5", 1, 0.08, ["precondition_frequency", "workers", "max_factor_dim"]),
        # time enough in all, but all are due 6 steps after they were started together
        (
            "precondition_frequency=50,stagger=false",
            *(1, 0.02, ["precondition_frequency", "refresh_delay", "workers", "max_factor_dim"]),
        ),
        # one alone takes longer than the 12 steps until it is due: more workers are no help
        ("", 4, 0.004, ["precondition_frequency", "refresh_delay", "max_factor_dim"]),
        ("workers=inline,precondition_frequency=5", 1, 0.3, ["precondition_frequency", "workers", "max_factor_dim"]),
        ("workers=deferred,precondition_frequency=5", 1, 0.3, ["precondition_frequency", "workers", "max_factor_dim"]),
    ],
)
def test_every_way_out_of_late_refreshes_is_enough(
    options: str, cores: int, step_seconds: float, ways: list[str]
) -> None:
    model = f"{__name__}:square_layers"

    def warned(line: str, cores: int, step_seconds: float) -> list[str]:
        numbers = {"--world-size": 2, "--cores": cores, "--step-seconds": step_seconds}
        arguments = [word for name, number in numbers.items() for word in (name, str(number))]
        found = report(f"method=shampoo,{line}".rstrip(","), *arguments, model=model).warnings()
        return [text for text in found if "cannot keep up" in text or "hold training up" in text]

    (text,) = warned(options, cores, step_seconds)
    found = re.findall(r"(\w+)=(\{.*?\}|\d+)", text.split("Enough would be ")[1])
    assert [name for name, _ in found] == ways
    for name, value in found:
        kept = [one for one in options.split(",") if one and not one.startswith(name)]
        more = max([cores, *map(int, re.findall(r"'count': (\d+)", value))])
        assert not warned(",".join([*kept, f"{name}={value}"]), more, step_seconds), name
    assert not warned(options, cores, 10.0)


@pytest.mark.parametrize(("layers", "ranks"), [(5, 4), (3, 2)])
def test_smaller_factors_are_enough_where_blocks_cannot_be_divided_evenly(layers: int, ranks: int) -> None:
    model = square_layers(layers)

    def made(**options: Any) -> Report:
        optimizer = Shampoo(model, **options)
        found = estimate(optimizer, optimizer.plan_elsewhere("ddp", ranks))
        return Report(optimizer=optimizer, found=found, machine=Machine(cores=1), engine="ddp", step_seconds=1.5e-3)

    (text,) = [warning for warning in made().warnings() if "cannot keep up" in warning]
    changed = made(max_factor_dim=int(text.split("max_factor_dim=")[1]))
    assert not any("cannot keep up" in warning for warning in changed.warnings())


def test_waits_by_hand() -> None:
    """Refreshes at steps 2 (used at once), 4, 8 and 16, each due one step later; each takes as long as three steps."""
    interval = Interval(first=2, growth=2, max=8)
    schedule = RefreshSchedule(interval=interval, delay=None, start=2, offsets={})
    beside = Crew(count=1, holds_training=False)
    assert waits(schedule, {"a": 3.0}, 20, 1.0, beside) == {2: 3.0, 4: 0.0, 5: 2.0, 8: 0.0, 9: 2.0, 16: 0.0, 17: 2.0}
    # two blocks: the second waits for the first, or has a worker of its own; the first of step 2 delays nobody else
    assert waits(schedule, {"a": 3.0, "b": 3.0}, 5, 1.0, beside) == {2: 6.0, 4: 0.0, 5: 5.0}
    two = Crew(count=2, holds_training=False)
    assert waits(schedule, {"a": 3.0, "b": 3.0}, 5, 1.0, two) == {2: 3.0, 4: 0.0, 5: 2.0}
    deferred = Crew(count=2, holds_training=True)
    assert waits(schedule, {"a": 3.0, "b": 1.0}, 5, 1.0, deferred) == {2: 3.0, 4: 0.0, 5: 3.0}
    inline = Crew(count=1, holds_training=True, in_the_step=True)
    assert waits(schedule, {"a": 3.0, "b": 1.0}, 5, 1.0, inline) == {2: 4.0, 4: 4.0, 5: 0.0}
    options = Shampoo(
        two_layers(), precondition_frequency={"first": 2, "growth": 2, "max": 8}, start_preconditioning_step=2
    ).options
    load = Load(options=options, seconds={"a": 3.0}, offsets={}, crew=beside)
    assert load.early_wait(1.0) == 5.0 and load.settled_wait(1.0) == 2.0 / 8


def test_what_is_said_of_the_start() -> None:
    common = ("--cores", "1", "--step-seconds", "0.1")
    model = f"{__name__}:square_layers"
    text = report("method=shampoo", *common, model=model).text()
    assert "while the interval grows (2, growing x 1.15 to 100)" in text
    constant = report("method=shampoo,precondition_frequency=100", *common, model=model)
    needed = constant.data()["refresh"]["core_seconds_per_interval"]["largest"]
    assert constant.early_wait() == pytest.approx(needed) and "the first roots hold" in constant.text()


def frozen_trunk() -> nn.Module:
    model = square_layers(5)
    for layer in list(model)[:4]:
        layer.requires_grad_(False)
    return model


def test_what_is_frozen_costs_no_time() -> None:
    trunk, alone = (report(model=f"{__name__}:{name}") for name in ("frozen_trunk", "one_layer"))
    assert trunk.seconds() == alone.seconds()


def one_layer() -> nn.Module:
    return square_layers(1)


class Experts(nn.Module):
    """Fused, as Transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(4, 2048, 512))


def test_experts_are_preconditioned_as_matrices() -> None:
    plan = Shampoo(Experts()).plan_elsewhere("fsdp2", 4)
    assert {unit.block.shape for unit in plan.units} == {(4, 1024, 512)}
    assert {unit.block.orders for unit in plan.units} == {(4, *[256] * 4, *[256] * 2)}


class Table(nn.Module):
    """A short side that is preconditioned, and a long one that is not, beside small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(200_000, 1024))
        self.layers = square_layers(8)


def test_what_makes_ranks_wait_for_each_other_is_named() -> None:
    model = f"{__name__}:Table"
    common = ("--world-size", "8", "--step-seconds", "0.1", "--statistics-flops", "1e12")
    found = report("method=shampoo", *common, "--engine", "fsdp2", model=model).warnings()
    (uneven,) = [text for text in found if "uneven" in text]
    assert "table (200000x1024)" in uneven and "{'match': '^table$', 'method': 'none'}" in uneven
    (travel,) = [text for text in found if "collectives" in text]
    assert "of them of table. overrides" in travel
    without = 'method=shampoo,overrides=[{match: "^table$", method: none}]'
    assert report(without, *common, "--engine", "fsdp2", model=model).warnings() == []
    # more ranks than blocks is no reason: four equal ones are as even as they can be
    assert report("method=shampoo", "--world-size", "64", "--step-seconds", "1", model=HERE).warnings() == []


def test_the_command_prints_tables_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", HERE, "--world-size", "8", "--engine", "hsdp", "--shard-size", "2"]
    assert main([*arguments, "--step-seconds", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "balance of refreshes" in text and "replicate" in text and "of a first-order step of 0.5 s" in text
    assert main([*arguments, "--json", "--method", "soap"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (data["world_size"], data["shard_size"], data["method"]) == (8, 2, "soap")
    memory = data["memory"]
    total = memory.pop("total")["mean"]
    assert total == pytest.approx(sum(values["mean"] for values in memory.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama"], "'lama' is no folder, no file and no model type of Transformers"),
        (["--model", "nowhere/config.json"], "there is no such file or folder"),
        (["--model", f"{__name__}:two_leyers"], "has no 'two_leyers'; did you mean 'two_layers'?"),
        (["--model", "llama", "--model-options", '{"hiden_size": 3}'], "did you mean 'hidden_size'?"),
        (["--model", HERE, "--world-size", "6", "--engine", "hsdp"], "how many ranks share one copy"),
        (["--model", HERE, "--world-size", "6", "--engine", "hsdp", "--shard-size", "4"], "no multiple"),
        (["--model", HERE, "--engine", "fsdp2", "--shard-size", "1"], "'hsdp' and 'fsdp1' have"),
        (["--model", HERE, "--flops", "0"], "flops=0.0: must be above 0"),
        (["--model", HERE, "--latency", "inf"], "latency=inf: must be at least 0, and finite"),
        (["--model", HERE, "--bandwidth", "-5"], "--bandwidth -5: must be above 0"),
        (["--model", HERE, "--sub-group-size", "0"], "--sub-group-size 0: must be at least 1"),
        (["--model", HERE, "--dtype", "auto"], "--dtype='auto'; choose one of 'float32'"),
        (["--model", f"{__name__}:fails"], "fails: RuntimeError: no such data here"),
        (["--model", f"{__name__}:lazy"], "parameter 'weight' has no shape yet"),
        (["--model", "llama", "--model-options", '{"hidden_size": 10, "num_attention_heads": 3}'], "llama: "),
        (["--model", HERE, "method=shampoo", "--method", "soap"], "says method='shampoo'"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


def fails() -> nn.Module:
    raise RuntimeError("no such data here\nand more")


def lazy() -> nn.Module:
    return nn.LazyLinear(3)


def test_a_configuration_that_is_none_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("transformers")
    for content, message in (("[1]", "a list where an object was to be"), ("{", "not JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            build_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the folder has no config\.json"):
        build_model(str(tmp_path))
    small = {"model_type": "llama", "hiden_size": 8, "num_hidden_layers": 1, "vocab_size": 11, "made_by": "somebody"}
    (tmp_path / "config.json").write_text(json.dumps(small))
    build_model(str(tmp_path))
    assert "no option 'hiden_size'; did you mean 'hidden_size'?; it is ignored" in caplog.text
    assert "made_by" not in caplog.text


def test_the_configuration_of_the_environment_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOO_CONFIG", "method=soap")
    assert report().optimizer.method == "soap" and report("--method", "kfac").optimizer.method == "kfac"


def test_models_without_numbers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    small = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 11}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(small))
    model = build_model(str(tmp_path), {"num_hidden_layers": 3}, torch.bfloat16)
    named = dict(model.named_parameters())
    assert "lm_head.weight" not in named and "model.layers.2.mlp.up_proj.weight" in named  # tied, and one layer more
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in named.values())
    assert layer_classes(model) == ["LlamaDecoderLayer"]
    assert modules_to_shard(model, layer_classes(model)) == [f"model.layers.{index}" for index in (2, 1, 0)]


def test_rates_of_this_machine_replace_those_given() -> None:
    found = measured(Machine(latency=1.0))
    assert found.latency == 1.0 and found.shard_bandwidth == Machine().shard_bandwidth
    assert 1e8 < found.flops < 1e13 and 1e8 < found.core_rate < 1e12 and found.memory_bandwidth > 1e8
