"""One run of one optimizer on one task, with its losses or with its times, in a process of its own."""

from __future__ import annotations

import copy
import importlib
import math
import multiprocessing
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import Contender, choose
from trained_tasks import TrainedTask, trained

from lightning_soo.optim.refreshing import RefreshError

POINTS = 50  # of a curve
WARM_UP = 0.05  # of the longest horizon's steps


def factor(step: int, horizon: int, longest: int) -> float:
    """Of the learning rate: linear warm-up, then linear decay to zero.

    The warm-up is a twentieth of the longest horizon's steps at every horizon: how many steps an optimizer needs before
    it can take a large learning rate does not depend on how many follow.
    """
    warm_up = min(max(1, round(WARM_UP * longest)), max(1, horizon - 1))
    return min(1.0, (step + 1) / warm_up) * min(1.0, (horizon - step) / max(1, horizon - warm_up))


def curve_steps(horizon: int) -> list[int]:
    """After which a curve has its points: every 2 %, and the last."""
    return sorted({max(1, round(horizon * point / POINTS)) for point in range(1, POINTS + 1)})


def train(
    task: TrainedTask, contender: Contender, lr: float, horizon: int, seed: int, clocked: bool = False
) -> dict[str, Any]:
    """One run with a schedule fitted to ``horizon``.

    Args:
        clocked: times instead of losses: evaluating between steps would give background workers time for nothing.

    Returns:
        ``loss`` at the end (None if not finite); ``curve``, pairs of step and loss, or, if clocked, ``times``, pairs of
        step and seconds since before the optimizer was made, and ``seconds``, until it was closed.

    Raises:
        Unsuited: the optimizer cannot train this model.
    """
    random.seed(seed)
    np.random.seed(seed)
    importlib.import_module(contender.module)
    seeded = task.at_seed(seed)
    net = seeded.model()
    batches = [seeded.batch(step) for step in range(horizon)]
    if clocked:
        spare = copy.deepcopy(net)  # what the first passes of a process cost belongs to nobody
        for _ in range(3):
            seeded.loss(spare, batches[0]).backward()
    torch.manual_seed(seed)
    points = set(curve_steps(horizon))
    curve: list[tuple[int, float]] = []
    times: list[tuple[int, float]] = []
    start = time.perf_counter()
    optimizer = contender.make(net, lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(batches):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step, horizon, task.longest)
        seeded.loss(net, batch).backward()
        try:
            optimizer.step()
        except (ArithmeticError, RefreshError, torch.linalg.LinAlgError):
            if clocked:
                raise
            curve.append((step + 1, math.nan))  # a learning rate at which matrices break down
            break
        optimizer.zero_grad()
        if step + 1 not in points:
            continue
        if clocked:
            times.append((step + 1, round(time.perf_counter() - start, 4)))
        else:
            curve.append((step + 1, evaluate(task, net)))
            if not math.isfinite(curve[-1][1]):
                break
    close = getattr(optimizer, "close", None)
    if close is not None:
        close()  # workers
    seconds = time.perf_counter() - start
    loss = evaluate(task, net) if clocked else curve[-1][1]
    found: dict[str, Any] = {"loss": loss if math.isfinite(loss) else None}
    if clocked:
        return found | {"seconds": round(seconds, 4), "times": times}
    return found | {"curve": [(step, loss) for step, loss in curve if math.isfinite(loss)]}


@torch.no_grad()
def evaluate(task: TrainedTask, net: torch.nn.Module) -> float:
    return float(f"{task.evaluate(net):.6g}")


def train_named(
    task: str, contender: str, threads: int, lr: float, horizon: int, seed: int, clocked: bool
) -> dict[str, Any]:
    """:func:`train` of what has a name, in the process that calls it."""
    torch.set_num_threads(threads)
    (one,) = [found for found in choose([contender]) if found.name == contender]
    return train(trained(task), one, lr, horizon, seed, clocked)


class Broken(RuntimeError):
    """A run that ended in an error, with what it printed."""


class Isolated:
    """Runs functions each in a process of its own, forked from one that has imported everything and trained nothing.

    So a run neither inherits random numbers, caches and threads nor waits for imports and data, and may start workers.
    """

    def __init__(self, task: str, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when the modules are imported, there
        os.environ["BENCHMARK_TASK"] = task
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["training", "preload"])

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of ``function(*arguments)``.

        Raises:
            Broken: with the process's traceback.
        """
        receiving, sending = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(sending, function, arguments))
        process.start()
        sending.close()
        try:
            fine, result = receiving.recv()
        except EOFError:
            fine, result = False, "the process ended without an answer"
        process.join()
        if not fine:
            raise Broken(result)
        return result


def _answer(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = True, function(*arguments)
    except BaseException:
        answer = False, traceback.format_exc()
    connection.send(answer)
    connection.close()
    sys.stdout.flush()
