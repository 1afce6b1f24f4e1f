"""`python -m tests.e2e.little_memory WHEN RECIPE`: train, and have too little memory or disk for one thing.

WHEN says for what: "step", "longest" (the try of the longest batch), "eval", "samples", "update", "save";
"disk": the disk of the run is full from the third step to the seventh. The address space is limited to what
is in use and a margin, which shrinks from one time to the next until memory runs out; so the limit of a step
lies between what the whole micro-batch and what a part of it needs. With several processes only the last
rank has too little.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tunesmith.cli.main import main
from tunesmith.core.proc import Process, spawn
from tunesmith.train import chunked_adamw
from tunesmith.train.loop import Trainer

FIRST_MARGIN_MIB, SHRINK = 64.0, 0.65
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of <malloc.h>
PLENTY_MIB = 2.0**20
HOLE_BYTES = 1 << 18


def is_squeezed() -> bool:
    return int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1


def limit_memory(margin_mib: float) -> None:
    if not is_squeezed():
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + int(margin_mib * 1024**2)
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fill_holes() -> list[int]:
    """Take what lies free between what is in use: it would serve in place of new memory."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    limit_memory(0.0)
    held = list(iter(lambda: libc.malloc(HOLE_BYTES), None)) if is_squeezed() else []
    limit_memory(PLENTY_MIB)
    return held


@contextmanager
def limited_memory(margin_mib: float) -> Iterator[None]:
    """Little memory for what is inside."""
    libc = ctypes.CDLL(None)
    libc.free.argtypes = [ctypes.c_void_p]
    held = fill_holes()
    limit_memory(margin_mib)
    try:
        yield
    finally:
        limit_memory(PLENTY_MIB)
        for place in held:
            libc.free(place)


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
        fill_holes()
        return super().train()

    def squeeze(self) -> None:
        limit_memory(self.margin_mib if self.state.max_tokens is None else PLENTY_MIB)
        self.margin_mib *= SHRINK


class AtSteps(Squeezed):
    """In the passes of a step, not in its update."""

    def step(self, batches: Any) -> Any:
        self.squeeze()
        return super().step(batches)

    def update(self, batches: Any) -> float:
        limit_memory(PLENTY_MIB)
        return super().update(batches)


class AtTheLongest(Squeezed):
    def try_longest_batch(self) -> None:
        while self.state.max_tokens is None:
            self.squeeze()
            super().try_longest_batch()
        self.squeeze()


class AtEvaluations(Squeezed):
    def evaluate(self) -> None:
        with limited_memory(self.margin_mib) if self.eval_tokens is None else nullcontext():
            super().evaluate()
        self.margin_mib *= SHRINK


class AtSamples(Squeezed):
    def show_samples(self, sample: Any) -> None:
        with limited_memory(0.0) if self.state.step else nullcontext():
            super().show_samples(sample)


class AtUpdates(Squeezed):
    """In the fourth step the optimizer's own memory is there for its first five chunks only."""

    def update(self, batches: Any) -> float:
        if self.state.step == 3:
            update, done = chunked_adamw.update_chunk, itertools.count()

            def squeezed(*args: Any, **options: Any) -> None:
                with limited_memory(0.0) if next(done) >= 5 else nullcontext():
                    update(*args, **options)

            chunked_adamw.update_chunk = squeezed
        return super().update(batches)


class AtSaves(Squeezed):
    """Two saves in the middle of the run."""

    def save(self, *, must: bool) -> None:
        with limited_memory(4.0) if self.state.step in (3, 4) else nullcontext():
            super().save(must=must)


class FullDisk(Trainer):
    def step(self, batches: Any) -> Any:
        filler = self.task.run.path / "filler"
        if self.engine.rank == 0 and self.state.step == 2:
            filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free))
        if self.engine.rank == 0 and self.state.step == 6:
            filler.unlink()
        return super().step(batches)


TRAINERS = {
    "step": AtSteps,
    "longest": AtTheLongest,
    "eval": AtEvaluations,
    "samples": AtSamples,
    "update": AtUpdates,
    "save": AtSaves,
    "disk": FullDisk,
}


def spawn_like_this(args: list[str], **options: Any) -> Process:
    """A worker that is this program too: what the launcher starts is `python -m tunesmith train …`."""
    return spawn([args[0], "-m", "tests.e2e.little_memory", sys.argv[1], *args[4:]], **options)


if __name__ == "__main__":
    from tunesmith.workflows import launch, train_job

    when, *rest = sys.argv[1:]
    train_job.Trainer = TRAINERS[when]  # type: ignore[misc]
    launch.spawn = spawn_like_this
    main(["train", *rest])
