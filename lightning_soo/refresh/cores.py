"""How many cores this process really has: the system's count, its affinity, and the quota of its control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def available_cores(root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores this process may use, at least 1.

    Args:
        root, membership: where control groups are mounted, and the file that names this process's.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([cores, *_quotas(root, membership)])))


def _quotas(root: Path, membership: Path) -> list[float]:
    """Cores allowed by every group above this process, version 2 (``cpu.max``) and 1 (``cpu.cfs_quota_us``)."""
    found: list[float] = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            found += _quota(base / group)
    return found


def _quota(group: Path) -> list[float]:
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((group / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
        except OSError:
            return []
    return [] if quota in ("max", "-1") else [float(quota) / float(period)]
