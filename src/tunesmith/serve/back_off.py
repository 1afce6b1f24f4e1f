"""How long to wait before what has ended is started again: longer each time that it has not lived long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BackOff:
    """The pause begins with first_s and doubles up to longest_s; what has lived for settled_s begins anew.

    failures: pauses since then.
    """

    first_s: float
    longest_s: float
    settled_s: float
    failures: int = 0

    def ended(self, *, lived_s: float) -> None:
        if lived_s > self.settled_s:
            self.failures = 0

    def next_pause_s(self) -> float:
        """Seconds to wait now."""
        pause = min(self.first_s * 2**self.failures, self.longest_s)
        self.failures += 1
        return float(pause)
