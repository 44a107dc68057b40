"""Persistent processes of one thread each that work a queue off; they end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _serve(connection: Connection, extras: list[Path]) -> None:
    """In the child: answer each ``(function, arguments)`` with what it returns, or its error."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        wait([parent.sentinel])
        os._exit(1)  # a killed study leaves nobody training

    threading.Thread(target=leave, daemon=True).start()
    import torch
    from plan import load_extras

    torch.set_num_threads(1)
    load_extras(extras)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((function(*arguments), None))
        except BaseException as error:
            connection.send((None, f"{type(error).__name__}: {error}"))


class Pool:
    """
    Args:
        jobs: processes.
        extras: files that register further methods and tasks, loaded by each.
    """

    def __init__(self, jobs: int, extras: list[Path]) -> None:
        self.jobs, self.extras = jobs, extras
        self.context = multiprocessing.get_context("spawn")
        self.idle: list[tuple[BaseProcess, Connection]] = []
        self.busy: dict[Connection, tuple[BaseProcess, Any]] = {}
        for name in THREADS:  # read by the children when they load numpy and torch
            os.environ[name] = "1"

    def _start(self) -> tuple[BaseProcess, Connection]:
        here, there = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(there, self.extras), daemon=True)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process, while they start too
        process.start()
        signal.signal(signal.SIGINT, handler)
        there.close()
        return process, here

    def work(
        self, next_item: Callable[[], Any], call: Callable[[Any], tuple[Callable[..., Any], tuple[Any, ...]]]
    ) -> Iterator[tuple[Any, Any, str | None]]:
        """Item, result and error of each, as they end.

        Args:
            next_item: the next one, None where there is none at the moment; results may make more.
            call: a module's function and its arguments, from an item.
        """
        while True:
            while len(self.busy) < self.jobs and (item := next_item()) is not None:
                process, connection = self.idle.pop() if self.idle else self._start()
                connection.send(call(item))
                self.busy[connection] = process, item
            if not self.busy:
                return
            for ready in wait(list(self.busy)):
                assert isinstance(ready, Connection)
                process, item = self.busy.pop(ready)
                try:
                    result, error = ready.recv()
                    self.idle.append((process, ready))
                except (EOFError, ConnectionResetError):
                    process.join()
                    result, error = None, f"its process ended with exit code {process.exitcode}"
                yield item, result, error

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for process, connection in (*self.idle, *((p, c) for c, (p, _) in self.busy.items())):
            process.terminate()
            process.join()
            connection.close()
        self.idle, self.busy = [], {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
