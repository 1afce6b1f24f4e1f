"""Progress of a download on stderr: done of all, speed, time left; a line now and then off a terminal."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tunesmith.core.progress import LOG_EVERY_S, console, say
from tunesmith.core.units import bytes_text, duration_text

UPDATE_EVERY_S = 0.1


class DownloadMeter:
    """Counts bytes from several threads. `have`: bytes of the total that are here from an earlier call."""

    def __init__(self, label: str, total: int, *, have: int = 0, quiet: bool = False) -> None:
        self.label, self.total, self.done = label, total, have
        self._quiet = quiet
        self._came = 0
        self._last_update = 0.0
        self._began = self._last_line = time.monotonic()
        self._lock = threading.Lock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total, completed=have)

    def __enter__(self) -> DownloadMeter:
        self._bar.start()
        return self

    def add(self, num_bytes: int) -> None:
        """Count bytes that came; fewer than none where bytes had to be thrown away."""
        with self._lock:
            self.done += num_bytes
            self._came += max(0, num_bytes)
            now = time.monotonic()
            if now - self._last_update >= UPDATE_EVERY_S or self.done >= self.total:
                self._last_update = now
                self._bar.update(self._task, completed=max(0, self.done))
            due = now - self._last_line >= LOG_EVERY_S
            if not due or self._quiet or console.is_terminal:
                return
            self._last_line = now
        say(self.line())

    def line(self) -> str:
        """`owner/name: 1.2 GiB of 3.0 GiB, 12.0 MiB/s, 2 min 30 s left`."""
        speed = self._came / max(time.monotonic() - self._began, 1e-3)
        left = f", {duration_text((self.total - self.done) / speed)} left" if speed > 0 else ""
        return (
            f"{self.label}: {bytes_text(self.done)} of {bytes_text(self.total)}, {bytes_text(speed)}/s{left}"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is None and not self._quiet and self._came:
            took = max(time.monotonic() - self._began, 1e-3)
            came = f"{bytes_text(self._came)} in {duration_text(took)}, {bytes_text(self._came / took)}/s"
            say(f"{self.label}: {came}")
