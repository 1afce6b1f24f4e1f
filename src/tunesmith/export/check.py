"""The outcome of comparing what was written with what it was made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison of logits: difference and bound are relative to the largest logit."""

    name: str
    difference: float
    bound: float
    source: str

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}
