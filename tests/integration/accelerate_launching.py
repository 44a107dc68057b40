"""Starts ``accelerate launch`` with our configurations, on CPUs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from launching import TESTS, run_bounded

RECIPES = Path(__file__).parent.parent.parent / "recipes"
LAUNCH = RECIPES / "launch"


def environment_of(**changes: str) -> dict[str, str]:
    """That of a launch on CPUs; an empty value takes a variable out."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("SOO_CONFIG", "ACCELERATE_USE_CPU")}
    ours = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": TESTS, "ACCELERATE_TORCH_DEVICE": "cpu"}
    return {name: value for name, value in {**inherited, **ours, **changes}.items() if value}


def launch_command(file: Path | str, *program: object, options: list[str] | None = None) -> list[str]:
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)),
        *("--main_process_port", "0", *(options or []), *map(str, program)),
    ]


def launch(
    file: Path | str,
    *program: object,
    options: list[str] | None = None,
    folder: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """``accelerate launch`` to its end."""
    return run_bounded(
        launch_command(file, *program, options=options),
        seconds=200,
        env=environment_of(**environment),
        folder=folder,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
