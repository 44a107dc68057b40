"""Prints, as json, what every script of the recipes and benchmarks says for --help; frameworks are imported once."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any


def print_help(path: Path, connection: Any) -> None:
    sys.argv, sys.path[0] = [str(path), "--help"], str(path.parent)
    out = StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(out):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as leaving:
        connection.send(out.getvalue() + str(leaving.code or ""))
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
    else:
        connection.send("no help")


def main(root: Path) -> None:
    warnings.simplefilter("ignore")
    import accelerate  # noqa: F401
    import lightning  # noqa: F401

    import lightning_soo  # noqa: F401

    fork, found = multiprocessing.get_context("fork"), {}
    for path in sorted([*root.glob("recipes/*/*.py"), *root.glob("benchmarks/*.py")]):
        if "ArgumentParser" not in path.read_text() and "parse_options" not in path.read_text():
            continue
        if "__main__" not in path.read_text():
            continue
        here, there = fork.Pipe(duplex=False)
        process = fork.Process(target=print_help, args=(path, there))
        process.start()
        found[path.relative_to(root).as_posix()] = here.recv() if here.poll(60) else "nothing was said for a minute"
        process.join(5)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
