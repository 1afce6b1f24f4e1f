"""The shape of a check: what is judged, how it stands, why it matters, and what puts it right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """One judgement. `found`: what is there; `why`: why it matters; `fix`: lines to run, in order, as root.

    A line of `fix` that starts with `#` is a note between the commands.
    """

    id: str
    title: str
    status: Status
    found: str
    why: str
    fix: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "title": self.title,
            "status": self.status,
            "found": self.found,
            "why": self.why,
            "fix": self.fix,
        }


@dataclass(frozen=True)
class Topic:
    """What a check is about, and why it matters."""

    id: str
    title: str
    why: str

    def ok(self, found: str) -> Check:
        return Check(self.id, self.title, "ok", found, self.why)

    def skip(self, found: str) -> Check:
        return Check(self.id, self.title, "skip", found, self.why)

    def warn(self, found: str, fix: list[str], why: str = "") -> Check:
        return Check(self.id, self.title, "warn", found, f"{self.why} {why}".strip(), fix)

    def fail(self, found: str, fix: list[str], why: str = "") -> Check:
        return Check(self.id, self.title, "fail", found, f"{self.why} {why}".strip(), fix)
