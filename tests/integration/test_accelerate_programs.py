"""What ``lightning_soo.launch`` can be asked to run, and what it says where it cannot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from accelerate_launching import environment_of
from launching import TESTS

from lightning_soo import cli, launch
from lightning_soo.integrations import programs

SAY = """
import os, sys

def say():
    print(sys.argv[1:], os.path.basename(sys.argv[0]))
    return 3
"""
TRAIN = """
import torch
from accelerate import Accelerator
from soo_demo_say import say

def train():
    say()
    accelerator = Accelerator()
    net = torch.nn.Linear(3, 3)
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    accelerator.backward(net(torch.ones(2, 3)).square().sum())
    optimizer.step()
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with a distribution that has two console scripts, and programs on PATH."""
    metadata, commands = tmp_path / "soo_demo-1.0.dist-info", tmp_path / "bin"
    metadata.mkdir()
    commands.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: soo-demo\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[console_scripts]\nsoo-demo-train = soo_demo_train:train\nsoo-demo-fail = soo_demo_say:say\n"
    )
    (tmp_path / "soo_demo_train.py").write_text(TRAIN)
    (tmp_path / "soo_demo_say.py").write_text(SAY)
    (tmp_path / "soo_demo_module.py").write_text(SAY + "say()")
    (commands / "soo-demo-file").write_text(f"#!/usr/bin/env python3\n{SAY}say()\n")
    (commands / "soo-demo-shell").write_text("#!/bin/sh\n")
    (tmp_path / "soo.yaml").write_text("method: shampoo\n")
    (tmp_path / "soo.json").write_text('{"method": "shampoo"}')
    (tmp_path / "launch.yaml").write_text("distributed_type: MULTI_GPU\n")
    for name in ("soo-demo-file", "soo-demo-shell"):
        (commands / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def doors(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, visible to this process."""
    for _ in range(3):  # a script's own folder takes the first place each time
        monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setenv("PATH", f"{installed / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "argv", ["before"])
    monkeypatch.setenv("SOO_CONFIG", "method=shampoo")
    return installed


def test_an_installed_command(installed: Path) -> None:
    """Taken over, with its own arguments."""
    run = subprocess.run(
        [sys.executable, "-m", "lightning_soo.launch", "soo-demo-train", "--its", "own"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=installed,
        env=environment_of(
            ACCELERATE_TORCH_DEVICE="",
            ACCELERATE_USE_CPU="true",
            PYTHONPATH=f"{installed}:{TESTS}",
            SOO_CONFIG="method=shampoo",
        ),
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "['--its', 'own'] soo-demo-train" in run.stdout
    assert "1 of 3x3" in run.stdout  # in the plan table


def test_what_is_run(doors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        programs.run(["soo-demo-fail", "one"])
    assert leaving.value.code == 3  # what its function returns, as of every console script
    programs.run(["soo-demo-file", "two"])
    programs.run([str(doors / "bin" / "soo-demo-file"), "three"])
    programs.run(["-m", "soo_demo_module", "four"])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "['one'] soo-demo-fail",
        "['two'] soo-demo-file",
        "['three'] soo-demo-file",
        "['four'] soo_demo_module.py",
    ]


def test_programs_that_cannot_be_run(doors: Path) -> None:
    with pytest.raises(programs.ProgramNotFound, match="no command of that name; did you mean 'soo-demo-train'"):
        programs.run(["soo-demo-trian"])
    with pytest.raises(programs.ProgramNotFound, match="soo-demo-shell is not a Python program"):
        programs.run(["soo-demo-shell"])


@pytest.mark.parametrize(
    ("package", "door", "arguments", "words"),
    [
        ("accelerate", launch.main, ["train.py"], "lightning_soo.launch: it needs Accelerate: pip install accelerate"),
        ("yaml", launch.main, ["train.py"], "needs PyYAML: pip install pyyaml, or use JSON"),
        ("yaml", cli.main, ["check", "soo.yaml"], "needs PyYAML: pip install pyyaml, or use JSON"),
        ("yaml", cli.main, ["config", "soo.json"], "needs PyYAML"),
        (
            "accelerate",
            cli.main,
            ["check", "soo.yaml", "--config_file", "launch.yaml"],
            "needs Accelerate: pip install",
        ),
        ("yaml", cli.main, ["check", "soo.json"], ""),
    ],
)
def test_packages_that_are_missing(
    doors: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    package: str,
    door: Callable[[list[str]], int | None],
    arguments: list[str],
    words: str,
) -> None:
    """A line that says what to install, not a traceback; what needs no such package goes on."""
    monkeypatch.chdir(doors)
    monkeypatch.setitem(sys.modules, package, None)
    try:
        code = door(arguments)
        said = capsys.readouterr()
    except SystemExit as leaving:
        assert isinstance(leaving.code, str) and words in leaving.code
    else:
        assert code == (1 if words else 0) and words in said.err
        assert words or "soo.json: shampoo: good" in said.out
