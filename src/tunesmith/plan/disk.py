"""Disk: what a run will write, against what is free on each file system involved."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal

from tunesmith.core.paths import free_bytes
from tunesmith.core.units import bytes_text
from tunesmith.recipe.memory import BLOCK_8BIT, MIN_8BIT
from tunesmith.recipe.schema import Optimizer

# Logs, tokenizer, reports and the folder entries of a run.
SMALL_FILES_BYTES = 32 * 1024**2
# Of a tokenised row: four bytes of id and one of mask a token, and its entries in the other arrays.
TOKEN_BYTES = 5
ROW_BYTES = 72
# Of a weight in a GGUF file: 32 codes of 8 bits with an fp16 scale.
Q8_0_BYTES = 34 / 32


@dataclass(frozen=True, kw_only=True)
class DiskPart:
    """Something that is written: what, where, how much; kind: by the run itself, by what may follow it, such
    as an export that nobody has asked for yet, or there already."""

    what: str
    folder: Path
    num_bytes: int
    kind: Literal["run", "later", "there"] = "run"

    def as_dict(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "folder": str(self.folder),
            "bytes": self.num_bytes,
            "kind": self.kind,
        }


@dataclass(frozen=True, kw_only=True)
class FileSystem:
    """Bytes that the parts in `folder` and elsewhere on the same file system need, and bytes free there."""

    folder: Path
    needed_bytes: int
    later_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder), "fits": self.fits}


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Bytes that a run needs at its fullest moment, by part, and the file systems that take them.

    checkpoint_bytes: of one; needed_bytes, free_bytes: where the run folder lies.
    """

    checkpoint_bytes: int
    checkpoints_held: int
    parts: tuple[DiskPart, ...]
    systems: tuple[FileSystem, ...] = field(default=())

    @property
    def needed_bytes(self) -> int:
        return self.systems[0].needed_bytes

    @property
    def free_bytes(self) -> int:
        return self.systems[0].free_bytes

    @property
    def fits(self) -> bool:
        return all(system.fits for system in self.systems)

    @property
    def full(self) -> FileSystem | None:
        """The first file system that does not suffice."""
        return next((system for system in self.systems if not system.fits), None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints_held": self.checkpoints_held,
            "needed_bytes": self.needed_bytes,
            "free_bytes": self.free_bytes,
            "fits": self.fits,
            "parts": [part.as_dict() for part in self.parts],
            "file_systems": [system.as_dict() for system in self.systems],
        }

    def text(self) -> str:
        return (
            f"{bytes_text(self.needed_bytes)} needed ({self.checkpoints_held} checkpoints of "
            f"{bytes_text(self.checkpoint_bytes)}), {bytes_text(self.free_bytes)} free"
        )


def checkpoint_bytes(weights: int, states: float) -> int:
    """Size of a checkpoint. Bytes: weights, of the stored weights; states, of the optimizer's state for all
    trained ones (`state_bytes` for each)."""
    return weights + ceil(states)


def state_bytes(optimizer: Optimizer, weight_bytes: int, *, count: int = MIN_8BIT) -> float:
    """Bytes that an optimizer keeps for one trained weight, itself of `weight_bytes`, in a tensor of `count`:
    two averages, in the weight's format or in blocks of 8 bits with an fp32 scale (small tensors: fp32);
    offloaded, two and the weight in fp32."""
    if optimizer == "adamw-8bit" and count < MIN_8BIT:
        return 2 * 4
    return {
        "adamw": 2 * weight_bytes,
        "adamw-8bit": 2 * (1 + 4 / BLOCK_8BIT),
        "adamw-offload": 3 * 4,
    }[optimizer]


def stored_rows(tokens: int, rows: int) -> int:
    """Bytes of tokenised rows in the cache."""
    return tokens * TOKEN_BYTES + rows * ROW_BYTES


def plan_disk(
    folder: Path,
    *,
    checkpoint: int,
    keep: int,
    saves: int,
    exports: Sequence[DiskPart] = (),
    elsewhere: Sequence[DiskPart] = (),
    present: int = 0,
) -> DiskPlan:
    """Compare a run's need with the free space of every file system that it writes to.

    folder: the run's; checkpoint: bytes of one; keep: checkpoints kept; saves: checkpoints written in all;
    exports, elsewhere: what else is written, in the run's folder or not; present: bytes that an earlier part
    of this run has already written.
    """
    held = min(saves, keep + 1)  # a new one is complete before the oldest goes
    told = f"{held} checkpoint{'s' if held != 1 else ''} of {bytes_text(checkpoint)}"
    parts = (
        DiskPart(what=told, folder=folder, num_bytes=held * checkpoint),
        *exports,
        DiskPart(what="logs, reports, tokenizer", folder=folder, num_bytes=SMALL_FILES_BYTES),
        *elsewhere,
    )
    return DiskPlan(
        checkpoint_bytes=checkpoint,
        checkpoints_held=held,
        parts=parts,
        systems=_systems(parts, folder, present),
    )


def _systems(parts: Sequence[DiskPart], run: Path, present: int) -> tuple[FileSystem, ...]:
    """The file systems of `parts`, the run's own first."""
    groups: dict[int, list[DiskPart]] = {}
    for part in parts:
        groups.setdefault(_device(part.folder), []).append(part)
    mine = _device(run)
    return tuple(
        _system(
            groups[device], run if device == mine else groups[device][0].folder, present * (device == mine)
        )
        for device in sorted(groups, key=lambda device: device != mine)
    )


def _system(parts: Sequence[DiskPart], folder: Path, present: int) -> FileSystem:
    sums = Counter[str]()
    for part in parts:
        sums[part.kind] += part.num_bytes
    return FileSystem(
        folder=folder,
        needed_bytes=max(0, sums["run"] - present),
        later_bytes=sums["later"],
        free_bytes=free_bytes(folder),
    )


def _device(folder: Path) -> int:
    """The number of the file system that `folder` lies on, or will lie on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return os.stat(folder).st_dev


def write_rate(folder: Path, num_bytes: int = 32 << 20) -> float:
    """Bytes a second at which a file is written to `folder` and is safe there; the file is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    path, block = folder / ".write-rate", bytes(1 << 20)
    began = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(num_bytes // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)
