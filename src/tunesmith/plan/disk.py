"""Disk: what a run will write, against what is free."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from tunesmith.core.paths import free_bytes
from tunesmith.core.units import bytes_text
from tunesmith.recipe.memory import BLOCK_8BIT, MIN_8BIT
from tunesmith.recipe.schema import Optimizer

# Logs, tokenizer, reports and the folder entries of a run.
SMALL_FILES_BYTES = 32 * 1024**2


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Bytes that a run needs at its fullest moment, by part, and bytes that are free there."""

    checkpoint_bytes: int
    checkpoints_held: int
    export_bytes: int
    needed_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"fits": self.fits}

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


def plan_disk(
    folder: Path, *, checkpoint: int, keep: int, saves: int, export: int, present: int = 0
) -> DiskPlan:
    """Compare a run's need with the free space where `folder` lies.

    checkpoint: bytes of one; keep: checkpoints kept; saves: checkpoints written in all; export: bytes of the
    final export; present: bytes that an earlier part of this run has already written there.
    """
    held = min(saves, keep + 1)  # a new one is complete before the oldest goes
    needed = max(0, held * checkpoint + export + SMALL_FILES_BYTES - present)
    return DiskPlan(
        checkpoint_bytes=checkpoint,
        checkpoints_held=held,
        export_bytes=export,
        needed_bytes=needed,
        free_bytes=free_bytes(folder),
    )
