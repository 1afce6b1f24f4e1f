"""What a prediction of one published row may answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


class Unknown(Exception):
    """A row does not tell all that its peak depends on; the message says what is missing."""


@dataclass(frozen=True)
class Prediction:
    """The peak predicted for a row, in GiB, and what explains it (peaks of phases, parts, figures used).

    assumed: what the row leaves open and was taken to be so, a sentence each.
    """

    gib: float
    detail: dict[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A row that no prediction is made for: no measured peak, or a configuration not known in full."""

    reason: str


def low(row: Row, *names: str) -> str:
    """Texts of the row in lower case, a blank between; empty where there is none."""
    told = (row.get(name) for name in names)
    return " ".join("" if text is None else str(text).lower() for text in told).strip()


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def count(row: Row, name: str, default: int | None = None) -> int:
    """A number of the row above 0; `default` where it has none. Raises Unknown."""
    value = row.get(name)
    if value is None:
        value = default
    if value is None or not is_count(value):
        raise Unknown(f"{name} is not told" if row.get(name) is None else f"{name} is {row[name]!r}")
    return int(value)
