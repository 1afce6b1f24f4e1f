"""Tokens that each key has used today (UTC), kept in a small file beside the keys' own."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from tunesmith.core.paths import locked, write_json
from tunesmith.core.progress import say


def usage_file(keys_file: Path) -> Path:
    return keys_file.with_name(keys_file.name.removesuffix(".json") + ".usage.json")


def used_today(keys_file: Path) -> dict[str, int]:
    """Tokens by the name of the key, as last written by the servers that use the file of keys."""
    return _current(usage_file(keys_file.expanduser().resolve()))[1]


def seconds_left_today() -> float:
    """Until the quotas of the next day begin."""
    now = datetime.now(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return (midnight - now).total_seconds()


class TokenUsage:
    """Counts tokens by key; `flush` adds what is new to the file, so that several servers share one quota.

    Every method may be called from any thread. Without a file nothing outlives the process.
    """

    def __init__(self, keys_file: Path | None = None) -> None:
        self._file = None if keys_file is None else usage_file(keys_file.expanduser().resolve())
        self._day, self._stored = (_today(), {}) if self._file is None else _current(self._file)
        self._new: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._told = False

    def used(self, name: str) -> int:
        with self._lock:
            self._turn_day()
            return self._stored.get(name, 0) + self._new[name]

    def add(self, name: str, tokens: int) -> None:
        with self._lock:
            self._turn_day()
            self._new[name] += tokens

    @property
    def unsaved(self) -> bool:
        return self._file is not None and any(self._new.values())

    def flush(self) -> None:
        """Write what is new; a disk that refuses is told of once, and asked again at the next flush."""
        with self._flushing:
            try:
                self._write()
                self._told = False
            except OSError as error:
                if not self._told:
                    say(f"warning: {self._file}: {error.strerror}: the tokens used are not saved")
                self._told = True

    def _write(self) -> None:
        with self._lock:
            self._turn_day()
            began, fresh = self._day, Counter(self._new)
        if self._file is None or not fresh:
            return
        with locked(self._file):
            day, stored = _current(self._file, least=began)
            whole = Counter(stored) + fresh
            write_json(self._file, {"day": day, "tokens": dict(whole)}, mode=0o600)
        with self._lock:
            if self._day == began:
                self._day, self._stored = day, dict(whole)
                self._new -= fresh

    def _turn_day(self) -> None:
        today = _today()
        if self._day not in (today, _after(today)):
            self._day, self._stored, self._new = today, {}, Counter()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _after(day: str) -> str:
    return (date.fromisoformat(day) + timedelta(days=1)).isoformat()


def _current(file: Path, least: str = "") -> tuple[str, dict[str, int]]:
    """The day that counts, not before `least`, and its tokens by key as the file has them.

    A day that had begun goes on counting when the clock is set back over midnight, or is behind another
    server's: its tokens would be given a second time.
    """
    today = _today()
    day, tokens = _read(file)
    counts = max(today, least, day if day == _after(today) else "")
    return counts, tokens if day == counts else {}


def _read(file: Path) -> tuple[str, dict[str, int]]:
    """(day, its tokens by key); nothing of a file that is missing or damaged."""
    try:
        found: Any = json.loads(file.read_bytes())
        return str(found["day"]), {str(name): int(count) for name, count in found["tokens"].items()}
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        say(f"warning: {file}: cannot be read ({type(error).__name__}): today's quotas begin anew")
        return "", {}
