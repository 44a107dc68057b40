"""LightningCLI with a yaml and nothing else: callback, strategy and optimizer, in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TESTS

pytest.importorskip("jsonargparse")
import yaml
from lightning.pytorch.cli import LightningCLI

sys.path.insert(0, str(Path(__file__).parent))
from cli_script import Data
from plain_loop import assert_trained
from worker_trainer import EPOCHS, OPTIONS, Model

from lightning_soo.callbacks import PreconditionerMonitor, SecondOrder
from lightning_soo.cli import main

HERE = Path(__file__).parent
QUIET = {
    "accelerator": "cpu",
    "max_epochs": EPOCHS,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
CALLBACK = {"class_path": "lightning_soo.callbacks.SecondOrder", "init_args": {"method": "shampoo", **OPTIONS}}


def cli(tmp_path: Path, trainer: dict[str, Any], *arguments: str, run: bool = True, **rest: Any) -> Any:
    """In this process; ``trainer`` and ``rest`` are written to a yaml."""
    file = tmp_path / "given.yaml"
    file.write_text(
        yaml.safe_dump({"model": {"scheduler": True}, "trainer": {**QUIET, "devices": 1, **trainer}, **rest})
    )
    given = [*(["fit"] if run else []), "--config", str(file), *arguments]
    return LightningCLI(Model, Data, args=given, run=run, save_config_callback=None, seed_everything_default=0)


@pytest.mark.parametrize("engine", ["ddp", "soo_fsdp2"])
def test_two_processes(tmp_path: Path, engine: str) -> None:
    """The program as it is, a yaml that two machines could share, and a second one for the engine."""
    soo = {
        "seed_everything": 0,
        "model": {"scheduler": True},
        "trainer": {
            **QUIET,
            "enable_checkpointing": True,
            "callbacks": [
                CALLBACK,
                {"class_path": "PreconditionerMonitor", "init_args": {"every_n_steps": 4}},
                {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path), "filename": "end"}},
            ],
        },
    }
    (tmp_path / "soo.yaml").write_text(yaml.safe_dump(soo))
    (tmp_path / "launch.yaml").write_text(f"trainer: {{strategy: {engine}, devices: 2}}")
    run = subprocess.run(
        [
            *(sys.executable, HERE / "cli_script.py", "fit"),
            *("--config", "soo.yaml", "--config", "launch.yaml"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        env={
            **{name: value for name, value in os.environ.items() if name != "MASTER_PORT"},
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": TESTS,
        },
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    table = [line.split() for line in (run.stdout + run.stderr).splitlines() if line.startswith("net.0.weight")]
    assert [line[2:4] for line in table] == [[engine.removeprefix("soo_"), "shampoo"]]  # from one process alone
    found = tmp_path / "end.ckpt"
    if found.is_dir():
        assert main(["export", str(found), str(tmp_path / "whole.pt")]) == 0
        found = tmp_path / "whole.pt"
    assert_trained(torch.load(found, weights_only=True)["state_dict"], 2, **OPTIONS)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["trainer"]["callbacks"][0]["init_args"]["precondition_frequency"] == 4


def test_optimizer_and_callback_in_one_process(tmp_path: Path) -> None:
    """By class path and by short name; the callback attaches an optimizer that is second-order already."""
    optimizer = {"lr": 0.02, "weight_decay": 0.1, **OPTIONS}
    schedule = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.25}}
    runs = [
        ({"callbacks": [CALLBACK]}, {}, []),
        ({}, {"optimizer": {"class_path": "lightning_soo.Shampoo", "init_args": optimizer}}, []),
        ({"callbacks": ["SecondOrder"]}, {"optimizer": {"class_path": "Shampoo", "init_args": optimizer}}, []),
        ({}, {}, ["--optimizer=Shampoo", *(f"--optimizer.{name}={value}" for name, value in optimizer.items())]),
    ]
    for trainer, rest, arguments in runs:
        by_epoch = bool(rest or arguments)  # LightningCLI's schedulers move once in an epoch
        extra = {"lr_scheduler": schedule} if by_epoch else {}
        done = cli(tmp_path, trainer, *arguments, **rest, **extra)
        assert type(done.trainer.optimizers[0]).__name__ == "Shampoo"
        assert_trained(done.model.state_dict(), 1, by_epoch=by_epoch, **OPTIONS)


def test_kfac_of_parameters_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"write the callback lightning_soo.callbacks.SecondOrder with method: kfac"):
        cli(tmp_path, {}, optimizer={"class_path": "lightning_soo.KFAC"})
    done = cli(tmp_path, {"callbacks": [{"class_path": "SecondOrder", "init_args": {"method": "kfac"}}]})
    assert type(done.trainer.optimizers[0]).__name__ == "KFAC"


STRATEGIES = {
    "soo_ddp": "SecondOrderDDPStrategy",
    "soo_fsdp": "SecondOrderFSDPStrategy",
    "soo_fsdp2": "SecondOrderFSDP2Strategy",
    "soo_hsdp": "SecondOrderFSDP2Strategy",
    "soo_deepspeed": "SecondOrderDeepSpeedStrategy",
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_by_name_and_by_class_path(tmp_path: Path, name: str) -> None:
    if name == "soo_deepspeed":
        pytest.importorskip("deepspeed")
    own = {
        "soo_hsdp": {"replicate_size": 2},
        "soo_deepspeed": {"stage": 3},
        "soo_fsdp": {"sharding_strategy": "SHARD_GRAD_OP"},
    }
    options = {"damping": 0.01}
    path = {
        "class_path": f"lightning_soo.strategies.{STRATEGIES[name]}",
        "init_args": {"method": "kfac", "options": options, **own.get(name, {})},
    }
    for strategy in (name, path):
        found = cli(tmp_path, {"strategy": strategy}, run=False).trainer.strategy
        assert type(found).__name__ == STRATEGIES[name]
        assert (found.method, found.options) == (("shampoo", {}) if strategy == name else ("kfac", options))
    if name == "soo_hsdp":
        assert found.replicate_size == 2
    if name == "soo_deepspeed":
        assert found.config["zero_optimization"]["stage"] == 3
    if name == "soo_fsdp":
        assert found.sharding_strategy.name == "SHARD_GRAD_OP"


def test_what_is_printed_is_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--print_config has the callback's options as they were given, and reads back as itself."""
    given = {
        **CALLBACK,
        "init_args": {**OPTIONS, "method": "kfac", "overrides": [{"match": "net.2", "method": "none"}]},
    }
    given["init_args"]["precondition_frequency"] = {"first": 2, "growth": 1.5, "max": 50}
    del given["init_args"]["preconditioner_eps"]
    printed = []
    for file in ([], ["--config", str(tmp_path / "printed.yaml")]):
        with pytest.raises(SystemExit) as leaving:
            cli(tmp_path, {"callbacks": [given]}, *file, "--print_config", run=False)
        assert leaving.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    (callback,) = yaml.safe_load(printed[0])["trainer"]["callbacks"]
    assert callback == {**given, "init_args": {"config": None, "adopt": False, **given["init_args"]}}
    again = cli(tmp_path, {}, "--config", str(tmp_path / "printed.yaml"), run=False).trainer.callbacks
    (built,) = [one for one in again if isinstance(one, SecondOrder)]
    assert built.method == "kfac" and built.options.keys() == given["init_args"].keys() - {"method"}


def test_config_keys(tmp_path: Path) -> None:
    """A file with the keys of every other door; what is written beside it wins."""
    (tmp_path / "soo.yaml").write_text("{method: sonew, bandwidth: 4, gamma: 0.1, monitor: 3}")
    init = {"config": str(tmp_path / "soo.yaml"), "bandwidth": 2}
    callbacks = [{"class_path": "lightning_soo.callbacks.SecondOrder", "init_args": init}]
    built = cli(tmp_path, {"callbacks": callbacks}, run=False).trainer.callbacks
    (callback,) = [one for one in built if isinstance(one, SecondOrder)]
    assert (callback.method, callback.options) == ("sonew", {"bandwidth": 2, "gamma": 0.1})
    assert not any(isinstance(one, PreconditionerMonitor) for one in built)  # the callback logs itself


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"callbacks": [{**CALLBACK, "init_args": {"precondition_freqency": 2}}]}, "'precondition_freqency' is not"),
        ({"callbacks": [{**CALLBACK, "init_args": {"precondition_frequency": "x"}}]}, "Given value: x"),
        ({"callbacks": [{**CALLBACK, "init_args": {"bandwidth": 2}}]}, "Shampoo has no option 'bandwidth'"),
        (
            {"callbacks": [{**CALLBACK, "init_args": {"config": {"method": "kfac", "dampng": 1}}}]},
            "did you mean 'damping'",
        ),
        ({"callbacks": [{**CALLBACK, "init_args": {"config": "nowhere.yaml"}}]}, "nowhere.yaml: there is no such file"),
        ({"callbacks": [{**CALLBACK, "init_args": {"method": "shampo"}}]}, "did you mean 'shampoo'"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: dict[str, Any], words: str) -> None:
    with pytest.raises((SystemExit, TypeError, ValueError, FileNotFoundError)) as refused:
        cli(tmp_path, trainer, run=False)
    assert words in capsys.readouterr().err + str(refused.value)
