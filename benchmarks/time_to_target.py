"""Seconds until AdamW's final loss, with a schedule fitted to each optimizer's own budget.

python benchmarks/time_to_target.py autoencoder-250              # the search: losses, no times
python benchmarks/time_to_target.py autoencoder-250 --clock      # the times, on a quiet machine
python benchmarks/time_to_target.py autoencoder-250 --report     # the page of what is stored, as the others end too

The search finds, for every optimizer, the best learning rate at the longest horizon and the fewest steps whose own
schedule ends at the target with every seed; it records no time, so the machine may be busy. Every run is a line in
benchmarks/runs, and none is repeated. The clock repeats the chosen points in turns over three seeds; worker start-up
and refreshes count. `search.py`, `clock.py` and `target_report.py` say how.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from clock import SEEDS, Clock, Entry
from contenders import Contender, Unsuited, choose
from measure import machine, processor, report
from run_store import FOLDER, Point, Store, loss_of
from search import Missing, Search
from target_report import complete, found_of, picture, tables
from trained_tasks import TRAINED, trained
from training import Broken, Isolated, train_named

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TRAINED))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--clock", action="store_true", help="time the points that the search has found")
    what.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--contenders", nargs="+", help="those whose name begins so, and AdamW foreach")
    parser.add_argument("--threads", type=int, default=2, help="of a run; runs of other numbers are other runs")
    parser.add_argument("--jobs", type=int, default=1, help="contenders searched at the same time")
    parser.add_argument("--turns", type=int, default=5, help="of the fitted runs")
    parser.add_argument("--equal-turns", type=int, default=3, help="of the runs of equal horizons, for their curves")
    parser.add_argument("--longest", type=int, help="steps of the longest run; the task's own by default")
    parser.add_argument("--targets", type=float, nargs="*", help="further losses; the task's own by default")
    parser.add_argument("--runs", type=Path, default=FOLDER, help="folder of the stored runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page and the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    where = machine()
    task = trained(arguments.task)
    longest = arguments.longest or task.longest
    targets = sorted(task.targets if arguments.targets is None else arguments.targets, reverse=True)
    store = Store(task.key, arguments.runs)
    isolated = Isolated(task.key, arguments.threads)

    def run(contender: Contender, lr: float, horizon: int, seed: int) -> dict[str, Any]:
        found = isolated(train_named, task.key, contender.name, arguments.threads, lr, horizon, seed, arguments.clock)
        return dict(found)

    searching = not arguments.clock and not arguments.report
    chosen = choose(arguments.contenders)
    by_name = {
        contender.name: Search(
            store, contender, longest, arguments.threads, run if searching else None, {"where": where}
        )
        for contender in chosen
    }
    # foreach and fused are the same method: one search
    searches = [(by_name[contender.same_as or contender.name], contender) for contender in chosen]
    try:
        first = searches[0][0]
        lr, _ = first.best(longest)
        own = [first.loss(lr, longest, seed) for seed in range(SEEDS)]
    except Missing as missing:
        raise SystemExit(f"{missing}: run the search first") from None

    def search(pair: tuple[Search, Contender]) -> None:
        try:
            found_of(*pair, targets, own)
        except (Broken, Unsuited) as error:
            print(f"{pair[1].name}: left out: {str(error).strip().splitlines()[-1]}", file=sys.stderr)

    if searching:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(search, [pair for pair in searches if pair[1].same_as is None]))
    everyone = complete(
        [(Search(store, s.contender, longest, arguments.threads), c) for s, c in searches], targets, own
    )
    if not everyone or everyone[0].longest.contender is not chosen[0] or everyone[0].point is None:
        raise SystemExit("AdamW's search is not complete: run the search first")
    clock = Clock(task.key, everyone[0].point, arguments.threads, arguments.runs)
    if arguments.clock:
        entries = {found.longest: arguments.equal_turns for found in everyone}
        entries |= {found.point: arguments.turns for found in everyone if found.point is not None}
        clock.take(entries, run, {"where": where})
        compare(entries, clock, store)
    lines = tables(task, everyone, clock, own, where)
    report(lines, arguments.results / f"time_to_target_{task.key}.md")
    picture(task, everyone, clock, own, arguments.results / f"time_to_target_{task.key}.png")


def compare(entries: Iterable[Entry], clock: Clock, store: Store) -> None:
    """Say where a clocked run ended elsewhere than the stored one: the processor or the method is another."""
    for entry in entries:
        for run in clock.runs(entry):
            point = Point.of(entry.contender.options, entry.lr, entry.horizon, run.seed, clock.threads)
            stored = store.get(point)
            if stored is not None and not math.isclose(loss_of(stored), run.loss, rel_tol=1e-3):
                there, here = processor(stored.get("where", "")), processor(run.where)
                why = f"found on {there}, clocked on {here}" if there != here else "its method has changed"
                print(
                    f"{entry.contender.name}, lr {entry.lr:g}, {entry.horizon} steps, seed {run.seed}: clocked "
                    f"{run.loss:g}, stored {loss_of(stored):g}: {why}; delete its lines and search again",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    main()
