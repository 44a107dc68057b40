"""What an option is worth: final losses of several settings at equal steps, over seeds.

python benchmarks/levers.py text-gpt '{}' '{"precondition_frequency": 10}' --lr 3e-3
python benchmarks/levers.py autoencoder-250 '{}' '{"max_preconditioner_dim": 1024}' --lr 3e-4 4e-3 --seeds 1
python benchmarks/levers.py autoencoder-250 '{}' '{"compute_dtype": "auto"}' --lr 3e-3 --method soap

A setting is json: what differs from the defaults. Schedules are those of time_to_target.py, at the longest horizon if
`--steps` says nothing else, and runs are kept in its store, so none is done twice. No time is taken: the machine may be
busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import METHODS, Contender, from_library
from measure import machine, report
from run_store import FOLDER, Store
from search import Search
from trained_tasks import TRAINED, TrainedTask, trained
from training import train


def measure(
    task: TrainedTask,
    method: str,
    settings: Sequence[Mapping[str, Any]],
    rates: Sequence[float],
    seeds: int,
    threads: int,
    store: Store,
    where: Mapping[str, Any],
    steps: int,
) -> list[str]:
    """The table: a row for every learning rate and setting. Args: steps: of a run, to which its schedule is fitted."""

    def run(contender: Contender, lr: float, horizon: int, seed: int) -> dict[str, Any]:
        return train(task, contender, lr, horizon, seed)

    lines = ["| lr | differs from the defaults | loss, by seed | mean |", "|---|---|---|---|"]
    for lr in rates:
        for given in settings:
            contender = from_library(f"ours, {json.dumps(given) if given else 'defaults'}", method, **given)
            search = Search(store, contender, task.longest, threads, run, dict(where))
            losses = [search.loss(lr, steps, seed) for seed in range(seeds)]
            lines.append(
                f"| {lr:g} | {json.dumps(given) if given else '-'} | {', '.join(f'{loss:.5g}' for loss in losses)} | "
                f"{statistics.mean(losses):.5g} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TRAINED))
    parser.add_argument("settings", nargs="+", type=json.loads, help="json, of options that differ from the defaults")
    parser.add_argument("--lr", type=float, nargs="+", required=True)
    parser.add_argument("--method", choices=list(METHODS), default="shampoo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a run; the task's longest by default")
    parser.add_argument("--threads", type=int, default=2, help="of a run; runs of other numbers are other runs")
    parser.add_argument("--runs", type=Path, default=FOLDER, help="folder of the stored runs")
    parser.add_argument("--output", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task, where = trained(arguments.task), machine()
    store, steps = Store(task.key, arguments.runs), arguments.steps or task.longest
    rows = measure(
        task,
        arguments.method,
        arguments.settings,
        arguments.lr,
        arguments.seeds,
        arguments.threads,
        store,
        {"where": where},
        steps,
    )
    head = [f"# Levers of {arguments.method}: {task.key}, {steps} steps", "", f"{where}.", ""]
    report([*head, *rows], arguments.output)


if __name__ == "__main__":
    main()
