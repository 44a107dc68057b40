"""What a refresh does to the steps around it: no refreshes, in the step, in a thread, in processes.

python benchmarks/background_roots.py [--steps 2000] [--output FILE]

The autoencoder at batch 250 with one torch thread on two cores or more; every block is refreshed at the same step
(`stagger=False`), the hardest case. The four take turns of one interval each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, report
from tasks import Task, autoencoder, digits

from lightning_soo import Shampoo
from lightning_soo.refresh.executors import ThreadExecutor
from lightning_soo.refresh.jobs import Job

INTERVAL = 50
OPTIONS: dict[str, Any] = {
    "lr": 1e-4,
    "betas": (0.9, 0.99),
    "precondition_frequency": INTERVAL,
    "start_preconditioning_step": 5,
    "stagger": False,
    "statistics_frequency": 5,
    "compute_dtype": "bfloat16",
}
MODES: dict[str, dict[str, Any]] = {
    # the first roots are computed as in the others, then never again
    "none": {"precondition_frequency": 10**9, "refresh_delay": 0, "workers": "inline"},
    "inline": {"workers": "inline"},
    "thread": {"workers": "thread"},
    "process": {"workers": "process"},
}


class Run:
    def __init__(self, task: Task, options: dict[str, Any]) -> None:
        self.task, self.net = task, task.model()
        self.optimizer = Shampoo(self.net, **{**OPTIONS, **options})
        self.step, self.seconds = 0, []
        for _ in range(2 * INTERVAL - 1):  # roots are in use; the next step starts a refresh, and so does every turn
            self.advance()
        self.seconds.clear()

    def advance(self) -> None:
        batch = self.task.batch(self.step)
        start = time.perf_counter()
        self.task.loss(self.net, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.step += 1


def private_mebibytes(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return total / 1024


def interpreter_rate() -> float:
    """How fast the training thread's Python goes while roots are computed in a thread, over when none are."""

    executor = ThreadExecutor(1)
    matrix = np.random.default_rng(0).standard_normal((1000, 1000))
    options = {"divisor": 1.0, "exponent": 4.0, "eps": 1e-6, "relative_eps": True}
    job = Job(
        function="lightning_soo.linalg.inverse_roots:inverse_roots",
        arrays=(matrix @ matrix.T,) * 4,
        options=options,
        result_bytes=4 * matrix.nbytes,
    )
    rates = []
    for busy in (True, False):
        if busy:
            executor.submit("root", job)
        number, start = 0, time.perf_counter()
        while executor.queued or (not busy and number < 300_000):
            number += 1
        rates.append(number / (time.perf_counter() - start))
    executor.close()
    return rates[0] / rates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    task = autoencoder(250, digits())
    runs = {name: Run(task, options) for name, options in MODES.items()}
    while len(runs["none"].seconds) < arguments.steps:
        for run in runs.values():
            for _ in range(INTERVAL):
                run.advance()
            run.optimizer.state_dict()  # waits for what is in flight, which would disturb the next one's turn
    base = np.median(runs["none"].seconds)
    lines = [
        "# Background roots",
        "",
        f"{where}.",
        f"Autoencoder, batch 250, every block refreshed every {INTERVAL} steps at the same step; "
        f"{len(runs['none'].seconds)} steps each, in turns.",
        "",
        "| roots | median, ms | / none | p99.9, ms | / median of none | longest, ms | / median of none "
        "| a refresh takes, s | workers' private memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        seconds = np.array(run.seconds)
        median, tail, longest = np.median(seconds), np.quantile(seconds, 0.999), seconds.max()
        pids = getattr(run.optimizer._refresher.executor, "processes", [])
        memory = f"{private_mebibytes(pids):.0f}" if pids else "-"
        latency = run.optimizer.diagnostics().get("refresh_seconds", 0.0)
        lines.append(
            f"| {name} | {1000 * median:.1f} | {median / base:.3f} | {1000 * tail:.0f} | {tail / base:.2f} | "
            f"{1000 * longest:.0f} | {longest / base:.2f} | {latency:.2f} | {memory} |"
        )
        run.optimizer.close()
    lines += ["", f"The training thread's Python runs at {interpreter_rate():.2f} of its rate while a thread computes."]
    report(lines, arguments.output)


if __name__ == "__main__":
    main()
