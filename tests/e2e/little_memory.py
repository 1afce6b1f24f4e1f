"""`python -m tests.e2e.little_memory WHEN RECIPE`: train with ever less memory until a micro-batch does not fit.

Before each step (WHEN is "step"), or for the try of the longest batch ("longest"), the address space is
limited to what is in use and a margin that shrinks until memory runs out; so the limit lies between what the
whole micro-batch and what a part of it needs.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path
from typing import Any

from tunesmith.cli.main import main
from tunesmith.train.loop import Trainer

FIRST_MARGIN_MIB, SHRINK = 64.0, 0.75
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of <malloc.h>


def limit_memory(margin_mib: float) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + int(margin_mib * 1024**2)
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def give_back_memory() -> None:
    """What is freed from now on goes back to the system; kept, it would serve the next step."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 17)
    libc.mallopt(M_TRIM_THRESHOLD, 1 << 17)
    libc.malloc_trim(0)


class Squeezed(Trainer):
    margin_mib = FIRST_MARGIN_MIB

    def train(self) -> Any:
        give_back_memory()
        return super().train()

    def squeeze(self) -> None:
        limit_memory(self.margin_mib if self.state.max_tokens is None else 2.0**20)
        self.margin_mib *= SHRINK


class AtSteps(Squeezed):
    def step(self, batches: Any) -> Any:
        self.squeeze()
        return super().step(batches)


class AtTheLongest(Squeezed):
    def try_longest_batch(self) -> None:
        while self.state.max_tokens is None:
            self.squeeze()
            super().try_longest_batch()
        self.squeeze()


if __name__ == "__main__":
    from tunesmith.workflows import train_job

    when, *args = sys.argv[1:]
    trainers = {"step": AtSteps, "longest": AtTheLongest}
    train_job.Trainer = trainers[when]  # type: ignore[misc]
    main(["train", *args])
