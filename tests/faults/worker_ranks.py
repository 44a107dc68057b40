"""One rank of three: every fault of one rank alone, in one world; what each rank saw is written for the tests."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import (
    a_gradient_scaler_skips,
    a_root_fails_on_one_rank,
    a_slow_rank,
    another_configuration_on_one_rank,
    no_gradient_on_some_ranks,
    shards_that_are_uneven_or_empty,
)
from rank_waits import a_rank_does_not_come, a_rank_has_gone, sizes_differ_on_one_rank

CASES = {
    "12": no_gradient_on_some_ranks,
    "13": another_configuration_on_one_rank,
    "14": a_root_fails_on_one_rank,
    "15": a_gradient_scaler_skips,
    "16": shards_that_are_uneven_or_empty,
    "17": a_slow_rank,
    "18": a_rank_does_not_come,
    "19": sizes_differ_on_one_rank,
    "gone": a_rank_has_gone,
}


def main(out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank = dist.get_rank()
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        begin = time.monotonic()
        try:
            results[name] = case(rank)
        except Exception:
            results[name] = {"raised": traceback.format_exc()}
        results[name]["took"] = time.monotonic() - begin
        (out / f"rank{rank}.json").write_text(json.dumps(results))
        if name != "gone":
            dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
