"""Many short programs, each in a process of its own, for the price of importing the frameworks once."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

AT_ONCE = 2


@dataclass(frozen=True)
class Program:
    """Args: arguments: a script, or ``-m`` and a module, and its own. environment: added; empty values take away."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "."
    seconds: int = 100


@dataclass(frozen=True)
class Result:
    """Args: output: of both streams."""

    code: int
    output: str


def run_forked(programs: Sequence[Program]) -> list[Result]:
    """Run them all, two at a time, forked from one process that has imported torch, Lightning and Accelerate."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        input=json.dumps([asdict(program) for program in programs]),
        capture_output=True,
        text=True,
        timeout=60 + sum(program.seconds for program in programs),
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "COLUMNS": "200"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [Result(**entry) for entry in json.loads(run.stdout.splitlines()[-1])]


def _become(program: Program, output: Any) -> None:
    """In the child: does not return."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    signal.alarm(program.seconds)
    os.chdir(program.folder)
    for name, value in program.environment.items():
        os.environ[name] = value
        if not value:
            del os.environ[name]
    code = 1
    try:
        first, *rest = program.arguments
        if first == "-m":
            sys.argv, sys.path[0] = rest, os.getcwd()  # as ``python -m`` has it
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    programs = [Program(**entry) for entry in json.load(sys.stdin)]
    warnings.simplefilter("ignore")
    import accelerate  # noqa: F401
    import lightning  # noqa: F401
    import torch

    import lightning_soo.callbacks
    import lightning_soo.strategies  # noqa: F401

    torch.set_num_threads(1)
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in programs]
        running: dict[int, int] = {}
        codes: dict[int, int] = {}
        for index, program in enumerate(programs):
            if len(running) == AT_ONCE:
                _wait(running, codes)
            child = os.fork()
            if child == 0:
                _become(program, outputs[index])
            running[child] = index
        while running:
            _wait(running, codes)
        results = []
        for index, output in enumerate(outputs):
            output.seek(0)
            results.append(Result(codes[index], output.read()))
    print(json.dumps([asdict(result) for result in results]))


def _wait(running: dict[int, int], codes: dict[int, int]) -> None:
    child, status = os.wait()
    codes[running.pop(child)] = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main()
