"""One configuration behind every door, and the command that checks it."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lightning_soo
from lightning_soo import KFAC, SOAP, Config, Shampoo, SONew, from_config, load_config
from lightning_soo.cli import main
from lightning_soo.integrations.launch_config import launch_problems

YAML = """
method: shampoo
precondition_frequency: {first: 2, growth: 1.5, max: 50}
preconditioner_eps: 1e-5   # a number in YAML 1.2, a word in 1.1
betas: [0.9, 0.99]
overrides: [{match: head, method: none}]
workers: {kind: thread, count: 1}
monitor: 20
"""
GOOD = {"distributed_type": "NO", "num_processes": 1, "mixed_precision": "no"}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


def test_every_form_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = {**yaml.safe_load(YAML), "preconditioner_eps": 1e-5}
    file, other = tmp_path / "soo.yaml", tmp_path / "soo.json"
    file.write_text(YAML)
    other.write_text(json.dumps(mapping))
    line = (
        "method=shampoo,precondition_frequency={first: 2, growth: 1.5, max: 50},preconditioner_eps=1e-5,"
        "betas=[0.9,0.99],overrides=[{match: head, method: none}],workers={kind: thread, count: 1},monitor=20"
    )
    monkeypatch.setenv("SOO_CONFIG", str(file))
    found = [load_config(source) for source in (mapping, YAML, file, str(file), other, line, None)]
    assert all(config == Config.from_mapping(mapping) for config in found)
    assert found[0].monitor == 20 and found[0].options["preconditioner_eps"] == 1e-5
    line = "max_factor_dim=None,overrides=[{match: head, max_factor_dim: None}],grafting=null"
    overrides = [{"match": "head", "max_factor_dim": None}]
    assert load_config(line).options == {"max_factor_dim": None, "overrides": overrides, "grafting": None}
    assert load_config("kfac") == load_config("method: kfac") == load_config("{method: kfac}") == Config(method="kfac")


@pytest.mark.parametrize("kind", [Shampoo, SOAP, SONew, KFAC])
def test_resolved_is_the_constructor(kind: Any) -> None:
    """Keys are exactly the constructor's, values build the same optimizer, and a yaml file holds them."""
    resolved = Config(method=kind.method).resolved()
    names = list(inspect.signature(kind).parameters)[1:]
    assert list(resolved) == ["method", "monitor", "adopt", *names]
    again = load_config(yaml.safe_dump(resolved))
    model = net()
    built, plain = from_config(again, model), kind(model)
    assert type(built) is kind and built.options == plain.options
    assert {k: v for k, v in built.defaults.items() if k != "betas"} == {
        k: v for k, v in plain.defaults.items() if k != "betas"
    }
    assert tuple(built.defaults["betas"]) == tuple(plain.defaults["betas"])


def test_built_and_taken_over() -> None:
    assert lightning_soo.from_config is from_config
    built = from_config("method=shampoo,lr=0.5,max_preconditioner_dim=4", net())
    assert isinstance(built, Shampoo) and built.options.max_preconditioner_dim == 4
    assert built.param_groups[0]["lr"] == 0.5
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3, weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    taken = from_config({"method": "soap", "eps": 1e-4}, model, optimizer)
    assert taken is optimizer and type(taken) is SOAP and scheduler.optimizer is taken
    group = taken.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.3, 0.2, 1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: shampo", ["method='shampo'", "did you mean 'shampoo'"]),
        ("precondition_freqency: 5", ["'precondition_freqency'", "did you mean 'precondition_frequency'"]),
        ("damping: 1.0", ["'damping'", "an option of method 'kfac'"]),
        ("max_preconditioner_dim: 0", ["max_preconditioner_dim=0", "at least 1"]),
        ("lr: fast", ["lr='fast'"]),
        ("workers: proces", ["kind='proces'", "did you mean 'process'"]),
        ("workers: {knd: process}", ["'knd'", "did you mean 'kind'"]),
        ("overrides: [{mtch: head}]", ["'mtch'", "did you mean 'match'"]),
        ("precondition_frequency: {first: 2}", ["'growth' is missing"]),
        ("precondition_frequency: {first: 2, growth: .inf, max: 9}", ["growth=inf", "a finite number"]),
        ("precondition_frequency: {first: 2, growth: fast, max: 9}", ["growth='fast'", "a finite number"]),
        ("monitor: often", ["monitor='often'"]),
        ("[1, 2]", ["expected keys and values"]),
        ("a: [1", ["not YAML"]),
    ],
)
def test_refusals_name_the_file_and_the_key(tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(file)
    for word in ["mine.yaml", *words]:
        assert word in str(caught.value)


def test_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOO_CONFIG", raising=False)
    with pytest.raises(ValueError, match="SOO_CONFIG"):
        load_config()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")
    monkeypatch.setenv("SOO_CONFIG", "method=shampoo,lrr=1")
    with pytest.raises(ValueError, match=r"SOO_CONFIG.*'lrr'; did you mean 'lr'"):
        load_config()
    with pytest.raises(ValueError, match="given twice"):
        load_config("lr=1,lr=2")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, launch = tmp_path / "soo.yaml", tmp_path / "launch.yaml"
    file.write_text(YAML)
    launch.write_text(yaml.safe_dump(GOOD))
    assert main(["config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert load_config(printed).resolved() == load_config(file).resolved()
    assert main(["check", str(file), "--config_file", str(launch)]) == 0
    assert capsys.readouterr().out.count("good") == 2
    file.write_text("precondition_freqency: 5")
    launch.write_text("distributed_type: FDSP\n")
    assert main(["check", str(file), "--config_file", str(launch)]) == 1
    errors = capsys.readouterr().err
    assert "did you mean 'precondition_frequency'" in errors and "did you mean 'FSDP'" in errors
    assert "2 problems" in errors
    assert main(["config", str(file)]) == 1
    assert "precondition_freqency" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_proceses": 2}, "did you mean 'num_processes'"),
        ({"distributed_type": "MULTI_CPU", "num_processes": 2}, "starts one process, not 2"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True}, "know nothing of each other"),
        ({"num_processes": 2}, "starts one process, not 2"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 0}, "num_processes=0"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4, "num_machines": 2}, "main_process_ip"),
        ({"distributed_type": "MEGATRON_LM"}, "not supported"),
        ({"distributed_type": False}, "in quotes"),
        ({"mixed_precision": "fp16", "use_cpu": True}, "does not work on CPUs"),
        ({"mixed_precision": "bf61"}, "did you mean 'bf16'"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_verison": 2}}, "did you mean 'fsdp_version'"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_use_orig_params": False}}, "trains nothing"),
        ({"fsdp_config": {"fsdp_version": 2}}, "no effect with distributed_type=NO"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, "clips gradients at 1.0"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stge": 2, "gradient_clipping": 0.0}},
            "did you mean 'zero_stage'",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}},
            "refused by Accelerate",
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "mixed_precision": None,
                "deepspeed_config": {"deepspeed_config_file": "ds.json"},
            },
            "has an 'optimizer'",
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "mixed_precision": None,
                "deepspeed_config": {"deepspeed_config_file": "ds.json"},
            },
            "did you mean 'damping'",
        ),
    ],
)
def test_traps_of_launch_configurations(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **changes}))
    (tmp_path / "ds.json").write_text(
        json.dumps({"optimizer": {"type": "Adam"}, "soo": {"method": "kfac", "dampng": 1}, "gradient_clipping": 0.0})
    )
    problems = launch_problems(file)
    assert any(words in problem and "launch.yaml" in problem for problem in problems), problems


def test_our_launch_configurations_are_sound() -> None:
    recipes = Path(__file__).parent.parent.parent / "recipes"
    load_config(recipes / "accelerate" / "soo.yaml")
    files = sorted((recipes / "launch").glob("*.yaml"))
    assert len(files) >= 14
    for file in files:
        assert launch_problems(file) == []
