"""What a prediction of one published row may answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Prediction:
    """The peak predicted for a row, in GiB, and what explains it (peaks of phases, parts, figures used)."""

    gib: float
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A row that no prediction is made for: no measured peak, or a configuration not known in full."""

    reason: str
