"""Program of a worker process: numpy, one BLAS thread, jobs in and results out through shared memory.

Started as a plain script by :class:`~lightning_soo.refresh.processes.ProcessExecutor`; it never imports torch and never
runs the user's program. Commands are JSON lines on stdin, answers JSON lines on stdout, arrays lie in the arena.

It ends when stdin closes, in the middle of a computation too, so no process outlives the trainer.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import queue
import select
import signal
import sys
import threading
import time
import types
from typing import Any

_PARENT_CHECK_SECONDS = 1.0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle; it closes the pipe
    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands, os.getppid()), daemon=True).start()
    setup = commands.get()
    sys.path[:] = setup["path"]
    if setup["cpus"]:
        os.sched_setaffinity(0, setup["cpus"])
    if setup["nice"]:
        os.nice(setup["nice"])
    package = types.ModuleType("lightning_soo")  # its own __init__ would import torch
    package.__path__ = [setup["package"]]
    sys.modules["lightning_soo"] = package
    arena = Arena(setup["arena"])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a function prints is not an answer
    with contextlib.suppress(BrokenPipeError):  # the trainer has gone
        print(json.dumps({"ready": os.getpid()}), file=answers)
        while True:
            print(json.dumps(run(commands.get(), arena)), file=answers)
    os._exit(0)


def _listen(commands: queue.SimpleQueue[dict[str, Any]], parent: int) -> None:
    """Queue commands; leave at once when the trainer closes the pipe, or is gone and another process holds it open."""
    unread = b""
    while True:
        if not select.select([0], [], [], _PARENT_CHECK_SECONDS)[0]:
            if os.getppid() != parent:
                os._exit(0)
            continue
        part = os.read(0, 65536)
        if not part:
            os._exit(0)
        *lines, unread = (unread + part).split(b"\n")
        for line in lines:
            commands.put(json.loads(line))


class Arena:
    """The shared memory; the trainer may have grown it since the last command."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def view(self, size: int) -> memoryview:
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self._descriptor, size)
        return memoryview(self._map)


def run(command: dict[str, Any], arena: Arena) -> dict[str, Any]:
    """Run one job. Whatever goes wrong is an answer: a worker that died would look like a fault of the machine."""
    start = time.perf_counter()
    try:
        import numpy as np

        memory = arena.view(command["size"])
        inputs = tuple(
            np.frombuffer(memory, dtype, int(np.prod(shape)), offset).reshape(shape)
            for offset, shape, dtype in command["inputs"]
        )
        module, _, name = command["function"].partition(":")
        arrays, diagnostics = getattr(importlib.import_module(module), name)(inputs, **command["options"])
        offset, capacity = command["output"]
        end, outputs = offset + capacity, []
        for array in arrays:
            if offset + array.nbytes > end:
                raise ValueError(f"the result needs more than the {capacity} bytes that were announced")
            np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)[...] = array
            outputs.append([offset, array.shape, array.dtype.str])
            offset += -(-array.nbytes // 8) * 8
        diagnostics = {key: float(value) for key, value in diagnostics.items()}
        error = ""
    except Exception as raised:  # MemoryError and whatever a user's function does, too
        outputs, error = [], f"{type(raised).__name__}: {raised}"
        diagnostics = getattr(raised, "diagnostics", {})
    return {
        "id": command["id"],
        "outputs": outputs,
        "diagnostics": diagnostics,
        "seconds": time.perf_counter() - start,
        "error": error,
    }


if __name__ == "__main__":
    main()
