"""The processor of this machine."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once."""
    usable = os.sched_getaffinity(0)
    seen: set[str] = set()
    for cpu in usable:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            seen.add(siblings.read_text())
        except OSError:
            seen.add(str(cpu))
    return max(1, min(len(seen), _cgroup_cpus()))


def _cgroup_cpus() -> int:
    """Whole CPUs that a container's quota allows; a large number when there is no quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period)) if quota != "max" else 1 << 20
    except (OSError, ValueError):
        return 1 << 20
