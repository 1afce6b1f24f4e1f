"""Progress on stderr: a live line on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 10.0

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line for people, on stderr."""
    console.print(text, markup=False, soft_wrap=True)


class Meter:
    """A progress bar: `with Meter("tokenise", total=900) as meter: meter.advance(1, "3 dropped")`."""

    def __init__(self, label: str, total: float | None = None, done: int = 0) -> None:
        self.label, self.total = label, total
        self.done: float = done
        self._live = console.is_terminal
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Meter:
        self._bar.start()
        self._last_line = time.monotonic()
        return self

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count `amount` more as done; `note` stands behind the bar."""
        self.done += amount
        self._bar.update(self._task, advance=amount, note=note)
        if not self._live and not console.quiet and time.monotonic() - self._last_line >= LOG_EVERY_S:
            self._last_line = time.monotonic()
            of = f"/{self.total:g}" if self.total else ""
            print(f"{self.label} {self.done:g}{of} {note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
