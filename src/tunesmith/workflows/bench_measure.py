"""Run a contender in a process of its own and measure it from outside: time, processor time, memory.

Nothing depends on what a contender says of itself but the ends and losses of its steps, which it writes as
events with the wall clock's time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tunesmith.core import proc
from tunesmith.core.events import read_events
from tunesmith.core.units import GIB

LOOK_EVERY_S = 0.2
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Usage:
    """A process and its children. peak_bytes: the most memory they held together; cpu: (time, processor
    seconds since the start) now and then; began, ended: time.time()."""

    began: float = 0.0
    ended: float = 0.0
    code: int = 0
    peak_bytes: int = 0
    cpu: list[tuple[float, float]] = field(default_factory=list)

    def look(self, pid: int) -> None:
        found = [(_memory(one), _cpu_s(one)) for one in family(pid)]
        together = sum(now for (now, _), _ in found)
        self.peak_bytes = max(self.peak_bytes, together, *(highest for (_, highest), _ in found), 0)
        self.cpu.append((time.time(), sum(seconds for _, seconds in found)))

    def cpu_between(self, begin: float, end: float) -> float:
        """Processor seconds between two moments, straight lines drawn between the looks."""
        return self._cpu_at(end) - self._cpu_at(begin)

    def _cpu_at(self, moment: float) -> float:
        for (before, low), (after, high) in pairwise(self.cpu):
            if before <= moment <= after:
                return low + (high - low) * (moment - before) / max(after - before, 1e-9)
        return self.cpu[-1][1] if self.cpu and moment > self.cpu[-1][0] else 0.0


@dataclass(frozen=True)
class Measured:
    """One run of one contender. Rates are of all steps but the first, which warms up; first_step_s: from
    the start of the process to the end of its first step; failure: why there are no figures."""

    contender: str
    method: str
    repeat: int
    tokens_per_s: float = 0.0
    tokens_per_cpu_s: float = 0.0
    first_step_s: float = 0.0
    wall_s: float = 0.0
    peak_gib: float = 0.0
    gpu_peak_gib: float | None = None
    losses: tuple[float, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    failure: str | None = None


def watch(args: Sequence[str], *, log: Path, env: Mapping[str, str]) -> Usage:
    """Run a program to its end, its output into `log`."""
    usage = Usage(began=time.time())
    process = proc.start(args, log=log, env=env)
    try:
        while process.poll() is None:
            usage.look(process.pid)
            time.sleep(LOOK_EVERY_S)
    finally:
        usage.code = proc.stop(process)
        usage.ended = time.time()
    return usage


def figures(usage: Usage, events: Path, tokens: Sequence[int]) -> dict[str, Any]:
    """The fields of a Measured. tokens [S]: useful tokens of every step. Raises ValueError if steps lack."""
    steps = list(read_events(events, "step"))
    if len(steps) != len(tokens) or len(steps) < 2:
        raise ValueError(f"it made {len(steps)} of {len(tokens)} steps")
    first, last = float(steps[0]["time"]), float(steps[-1]["time"])
    timed = sum(tokens[1:])
    start = next(read_events(events, "start"), {})
    peaks = [step["peak_gib"] for step in steps if "peak_gib" in step]
    return {
        "tokens_per_s": timed / (last - first),
        "tokens_per_cpu_s": timed / max(usage.cpu_between(first, last), 1e-9),
        "first_step_s": first - usage.began,
        "wall_s": usage.ended - usage.began,
        "peak_gib": usage.peak_bytes / GIB,
        "gpu_peak_gib": max(peaks) if peaks else None,
        "losses": tuple(float(step["loss"]) for step in steps),
        "versions": start.get("versions", {}),
    }


# -- /proc -------------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all that it started, as far as they live."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                continue
    return found


def _memory(pid: int) -> tuple[int, int]:
    """(resident bytes, the most there ever were): the kernel's own high-water mark misses no peak."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    kib = {
        line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS:", "VmHWM:"))
    }
    return kib.get("VmRSS", 0) * 1024, kib.get("VmHWM", 0) * 1024


def _cpu_s(pid: int) -> float:
    """Processor seconds of a process and of its children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_S
