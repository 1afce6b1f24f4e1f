"""`events.jsonl`: what happened in a run, one JSON object a line, append-only.

Every event has `time` (seconds since the epoch) and `event` (its kind). Kinds: start, data, plan, step,
eval, sample, checkpoint, resume, out_of_memory, warning, end. A line cut by a crash is skipped by the
reader and closed with a newline by the next writer.
"""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class EventLog:
    """Appends events to a file, each at once; while the disk is full they wait in memory for the next."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("ab", buffering=0)
        self._waiting = b"\n" if torn else b""

    def write(self, event: str, **fields: Any) -> None:
        line = {"time": round(time.time(), 3), "event": event} | {k: _plain(v) for k, v in fields.items()}
        self._waiting += json.dumps(line, ensure_ascii=False).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise

    def close(self) -> None:
        self._flush()
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path, event: str | None = None) -> Iterator[dict[str, Any]]:
    """The whole events of a file, oldest first; only those of one kind if `event` is given."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and (event is None or found.get("event") == event):
                yield found
