"""Two machines are two launchers with one process each; here both are on localhost, and the run is a plain loop's."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from accelerate_launching import LAUNCH, environment_of, free_port, launch_command
from accelerate_script import train
from test_accelerate import CONFIGS, SMALL, assert_same, plain_loop

from lightning_soo.integrations.accelerate import prepare

SCRIPT = Path(__file__).parent / "accelerate_script.py"
ALONE = ["--num_processes", "2", "--mixed_precision", "no"]  # one process on each


def check(folder: Path, method: str) -> None:
    expected = plain_loop(method)
    for rank in range(2):
        found = torch.load(folder / f"script{rank}.pt", weights_only=True)
        assert_same(found["whole"], expected)
        assert_same(found["resumed"], expected)


def test_a_launcher_on_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one process goes on from what both have saved."""
    config = tmp_path / "soo.yaml"
    config.write_text(json.dumps(CONFIGS["shampoo"]))
    place = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    program = ["-m", "lightning_soo.launch", SCRIPT, tmp_path]
    file = LAUNCH / "two_machines.yaml"
    machines = [
        subprocess.Popen(
            launch_command(file, *program, options=[*ALONE, *place, "--machine_rank", str(machine)]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment_of(SOO_CONFIG=str(config)),
        )
        for machine in range(2)
    ]
    try:
        outputs = [machine.communicate(timeout=150)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    check(tmp_path, "shampoo")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    alone = functools.partial(prepare, config=CONFIGS["shampoo"])
    assert_same(train(tmp_path / "state", resume=True, seed=7, prepare=alone), plain_loop("shampoo"))
    assert "middle.weight" in outputs[0] and "middle.weight" not in outputs[1]  # the plan, from the main process


SRUN = """#!/bin/bash
shift
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks="$tasks $!"; done
for task in $tasks; do wait "$task" || exit 1; done
"""
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames machine[1-2]" ] || exit 1
echo 127.0.0.1
echo 127.0.0.2
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_slurm_script(tmp_path: Path) -> None:
    """With an ``srun`` that starts both tasks here: FSDP2 over two nodes."""
    config, commands = tmp_path / "soo.yaml", tmp_path / "bin"
    config.write_text(json.dumps(CONFIGS["kfac"]))
    commands.mkdir()
    accelerate = f'#!/bin/bash\n[ "$1" = launch ] && shift\nexec {sys.executable} -m accelerate.commands.launch "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "accelerate": accelerate}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    launch = tmp_path / "fsdp2.yaml"
    launch.write_text(
        (LAUNCH / "fsdp2_cpu.yaml")
        .read_text()
        .replace("TRANSFORMER_BASED_WRAP", SMALL[1] + "\n  fsdp_min_num_params: 30")
    )
    job = {"SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "machine[1-2]", "SLURM_GPUS_ON_NODE": "1"}
    environment = environment_of(
        SOO_CONFIG=str(config),
        LAUNCH_CONFIG=str(launch),
        MAIN_PROCESS_PORT=str(free_port()),
        PATH=f"{commands}{os.pathsep}{os.environ['PATH']}",
        **job,
    )
    command = ["bash", str(LAUNCH / "slurm.sh"), str(SCRIPT), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    check(tmp_path, "kfac")
    assert sum(line.startswith("middle.weight") for line in run.stdout.splitlines()) == 2  # whole and resumed
    del environment["SOO_CONFIG"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environment, check=False)
    assert refused.returncode != 0 and "set SOO_CONFIG" in refused.stderr
