"""The memory of this machine, as far as this process may use it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
NO_LIMIT = 1 << 60  # version 1 of cgroups writes a number as large as this for none


@dataclass(frozen=True)
class HostMemory:
    """total_bytes: with swap, but at most what a container's limit allows; free_bytes: of it without swap,
    pages that the system keeps of files counted as free; limited: a container's limit decides."""

    total_bytes: int
    free_bytes: int
    limited: bool


def host_memory(root: Path = ROOT) -> HostMemory:
    """What /proc/meminfo and the cgroups (versions 1 and 2) that this process is in allow."""
    found = _meminfo(root)
    total, free = found["MemTotal"] + found.get("SwapTotal", 0), found["MemAvailable"]
    limits = _limits(root)
    limit = min((most for most, _ in limits), default=NO_LIMIT)
    left = min((most - used for most, used in limits), default=NO_LIMIT)
    return HostMemory(min(total, limit), max(0, min(free, left)), limit < total)


def process_bytes(root: Path = ROOT) -> int:
    """Memory of this process now, the pages that it maps of files included."""
    pages = int((root / "proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _meminfo(root: Path) -> dict[str, int]:
    text = (root / "proc/meminfo").read_text()
    return {name: int(kib) * 1024 for name, kib in re.findall(r"(?m)^(\w+):\s+(\d+) kB", text)}


def _limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used without pages of files that can be given up) of every cgroup above this process."""
    found = []
    for folder, most, used, inactive in _groups(root):
        try:
            limit = int((folder / most).read_text())
            spent = int((folder / used).read_text())
            stat = dict(re.findall(r"(?m)^(\w+) (\d+)$", (folder / "memory.stat").read_text()))
        except (OSError, ValueError):  # "max", or a root group without these files
            continue
        if limit < NO_LIMIT:
            found.append((limit, max(0, spent - int(stat.get(inactive, 0)))))
    return found


def _groups(root: Path) -> list[tuple[Path, str, str, str]]:
    """The folders of this process's memory cgroups, innermost first, and the names of their files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, and only the top is there.
        parts = [] if ".." in path else [part for part in path.split("/") if part]
        folders = [top.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
        found += [(folder, *names) for folder in folders if folder.is_dir()]
    return found
