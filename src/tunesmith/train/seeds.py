"""The random numbers of a step: functions of (seed, step, micro-batch) alone, whatever came before."""

from __future__ import annotations

import hashlib

import torch


def seed_everything(seed: int, step: int, micro: int) -> None:
    """Give torch the random state of one micro-batch."""
    torch.manual_seed(seed_of(seed, step, micro))


def seed_of(seed: int, step: int, micro: int) -> int:
    """63 bits of the numbers' hash."""
    digest = hashlib.sha256(f"{seed} {step} {micro}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
