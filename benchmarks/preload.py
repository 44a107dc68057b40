"""Imported by the process that runs are forked from: reads a task's data once.

On one thread, which starts no pool of threads: those would not survive the fork.
"""

import os

import torch

torch.set_num_threads(1)
from trained_tasks import trained  # noqa: E402

trained(os.environ["BENCHMARK_TASK"])
