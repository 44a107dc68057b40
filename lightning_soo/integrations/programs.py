"""What a launch is asked to run: a script, a module, or a command that some package has installed."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points

from lightning_soo.naming import nearest


class ProgramNotFound(Exception):
    """With what was looked for, and the nearest name."""


def run(arguments: Sequence[str]) -> None:
    """Run ``script.py``, ``-m module`` or an installed command as the shell would, each with its own arguments.

    Raises:
        ProgramNotFound: there is no such thing, or it is not written in Python.
    """
    name, *rest = arguments
    if name == "-m":
        sys.argv = [rest[0], *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    command = None if os.path.isfile(name) else _find_command(name)
    if isinstance(command, EntryPoint):
        sys.argv = [shutil.which(name) or name, *rest]
        sys.exit(command.load()())
    path = command or name
    sys.argv = [path, *rest]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    runpy.run_path(path, run_name="__main__")


def _find_command(name: str) -> EntryPoint | str:
    """A console script by its entry point, or the path of an executable that Python runs."""
    installed = entry_points(group="console_scripts")
    found = next(iter(installed.select(name=name)), None)
    if found is not None:
        return found
    path = shutil.which(name)
    if path is None:
        raise ProgramNotFound(
            f"there is no script {name!r}, and no command of that name{nearest(name, installed.names)}; a module is "
            f"run by -m {name}"
        )
    with open(path, "rb") as file:
        first = file.readline(200)
    if not first.startswith(b"#!") or b"python" not in first:
        raise ProgramNotFound(f"{path} is not a Python program: give the script that it starts, or -m and its module")
    return path
