"""Where a training step spends its time: phases of Shampoo, SOAP and K-FAC, beside what flops and bytes allow.

python benchmarks/profile_step.py [--threads 1 2] [--tasks autoencoder-250 text-gpt] [--output FILE]

Functions of the library are timed from outside while they run; a phase does not contain the phases it calls. Each
method runs with its defaults over one interval, the one to which the default grows, so that statistics and refreshes
are counted at their share of a step.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from contenders import BETAS, GROWN
from measure import eigh_seconds, gemm_rate, machine, memory_rate, report
from tasks import Task, autoencoder, digits, text_gpt
from torch import Tensor, nn

from lightning_soo import KFAC, SOAP, Shampoo
from lightning_soo.capture import factors
from lightning_soo.optim import base, directions, grafting
from lightning_soo.optim.refreshing import Refresher
from lightning_soo.placement.costs import product_flops
from lightning_soo.preconditioners.eigenbasis import EigenbasisBlock
from lightning_soo.preconditioners.kronecker import KroneckerBlock, KroneckerStatistics
from lightning_soo.preconditioners.layer_factors import LayerFactorsBlock

TASKS: dict[str, Callable[[], Task]] = {
    "autoencoder-250": lambda: autoencoder(250, digits()),
    "autoencoder-1000": lambda: autoencoder(1000, digits()),
    "text-gpt": text_gpt,
}
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "Shampoo": lambda net: Shampoo(net, lr=1e-4, betas=BETAS, **GROWN),
    "SOAP": lambda net: SOAP(net, lr=1e-4, betas=BETAS, **GROWN),
    "K-FAC": lambda net: KFAC(net, lr=1e-4, **GROWN),
}
MODEL, OTHER, REFRESH = "forward and backward pass", "the rest: Python, views, copies", "refreshes, waited for"
Work = Callable[..., dict[str, float]]  # arguments of a call -> flops by dtype, or bytes as "memory"


@dataclass(frozen=True)
class Phase:
    """A function that is timed: where it is looked up, and what its calls have to do at least."""

    name: str
    owner: Any
    function: str
    work: Work


def _bytes(passes: float) -> Work:
    """Of the largest tensor among the arguments, moved so many times."""

    def work(*arguments: Any, **_: Any) -> dict[str, float]:
        return {"memory": passes * max(value.nbytes for value in arguments if isinstance(value, Tensor))}

    return work


def _directions(products: int) -> Work:
    def work(block: KroneckerBlock, *_: Any, **__: Any) -> dict[str, float]:
        return {_name(block.compute_dtype): products * product_flops(block.block)}

    return work


def _statistics(_: Any, block: Any, *__: Any, **___: Any) -> dict[str, float]:
    return {"float32": product_flops(block) / 2}  # symmetry allows half


def _factor(rows: Tensor, dtype: torch.dtype, gram_dtype: torch.dtype | None = None) -> dict[str, float]:
    return {_name(gram_dtype or dtype): float(rows.shape[0] * rows.shape[1] ** 2)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PHASES = (
    Phase("are gradients finite", base, "largest_magnitude", _bytes(1)),
    # gradient and two moments read, two moments written, the direction zeroed, read and written
    Phase("moments and the graft", grafting, "update", _bytes(8)),
    Phase("statistics", KroneckerStatistics, "observe", _statistics),
    Phase("statistics", factors, "gram", _factor),
    Phase("directions", KroneckerBlock, "precondition", _directions(1)),
    Phase("directions", EigenbasisBlock, "precondition", _directions(3)),
    Phase("directions", LayerFactorsBlock, "direction", _directions(2)),
    Phase("norms", directions, "squared_norm", _bytes(1)),
    Phase("apply", base, "move", _bytes(3)),
    Phase(REFRESH, Refresher, "advance", lambda *_, **__: {}),
)


@dataclass
class Profile:
    """Seconds and least work of each phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    work: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    _inner: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time of the body under ``name``, without what is counted inside it."""
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            self.seconds[name] += whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the functions of all phases."""
        originals = [(phase, phase.owner.__dict__[phase.function]) for phase in PHASES]
        for phase, original in originals:
            setattr(phase.owner, phase.function, self._wrap(phase, original))
        try:
            yield
        finally:
            for phase, original in originals:
                setattr(phase.owner, phase.function, original)

    def _wrap(self, phase: Phase, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            for kind, amount in phase.work(*arguments, **named).items():
                self.work[phase.name][kind] += amount
            with self.timed(phase.name):
                return original(*arguments, **named)

        return call


def profile(task: Task, make: Callable[[nn.Module], Any]) -> tuple[Profile, int, float]:
    """The profile of one interval, its steps, and the cubes of orders that were refreshed in it.

    A job is counted as the cube of an order over 1000^3, so that seconds of one such ``eigh`` can be multiplied.
    """
    net = task.model()
    optimizer = make(net)
    interval = optimizer.options.precondition_frequency.max
    begun = optimizer.options.start + interval
    found = Profile()

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            batch = task.batch(step)
            with found.timed(MODEL):
                task.loss(net, batch).backward()
            with found.timed(OTHER):
                optimizer.step()
                optimizer.zero_grad()

    steps(0, begun)
    with found.installed():
        found.seconds.clear()
        steps(begun, begun + interval)
    cubes = sum((order / 1000) ** 3 for unit in optimizer.attach().units for order in unit.block.orders)
    optimizer.close()
    return found, interval, cubes


def table(found: Profile, steps: int, cubes: float, flops: float, rates: dict[str, float]) -> list[str]:
    """One row a phase: milliseconds a step, share, what is counted, what that allows."""
    found.work[MODEL]["float32"] = flops * steps
    total = sum(found.seconds.values())
    lines = [
        "| phase | ms/step | share | Gflop a step | MB a step | bound, ms | measured / bound |",
        "|---|---|---|---|---|---|---|",
    ]
    bounds = 0.0
    for name, seconds in sorted(found.seconds.items(), key=lambda item: -item[1]):
        work = found.work[name]
        bound = sum(amount / rates[kind] for kind, amount in work.items())
        if name == REFRESH:
            bound = cubes * rates["eigh"] / torch.get_num_threads()
        bounds += bound
        counted = sum(amount for kind, amount in work.items() if kind != "memory") / steps
        lines.append(
            f"| {name} | {1000 * seconds / steps:.2f} | {100 * seconds / total:.0f} % | "
            + (f"{counted / 1e9:.2f} | " if counted else "| ")
            + (f"{work['memory'] / steps / 1e6:.1f} | " if work.get("memory") else "| ")
            + (f"{1000 * bound / steps:.2f} | {seconds / bound:.2f} |" if bound else "| |")
        )
    lines.append(
        f"| all | {1000 * total / steps:.2f} | 100 % | | | {1000 * bounds / steps:.2f} | {total / bounds:.2f} |"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["autoencoder-250", "text-gpt"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    lines = ["# Where a training step spends its time", "", f"{machine()}."]
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rates = {"float32": gemm_rate(torch.float32), "bfloat16": gemm_rate(torch.bfloat16)}
        rates |= {"memory": memory_rate(), "eigh": eigh_seconds()}
        lines += [
            "",
            f"{threads} thread{'s' * (threads > 1)}: float32 product {rates['float32'] / 1e9:.0f} Gflop/s, bfloat16 "
            f"{rates['bfloat16'] / 1e9:.0f}, copy {rates['memory'] / 1e9:.0f} GB/s, float64 eigh of order 1000 "
            f"(one thread) {1000 * rates['eigh']:.0f} ms.",
        ]
        for name in arguments.tasks:
            task = TASKS[name]()
            for method in arguments.methods:
                found, steps, cubes = profile(task, METHODS[method])
                lines += ["", f"## {method}, {task.name}, {threads} thread{'s' * (threads > 1)}", ""]
                lines += table(found, steps, cubes, task.flops, rates)
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
