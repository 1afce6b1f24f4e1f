"""One JSON line a request: who asked what, how it ended, how long it took. Never keys."""

from __future__ import annotations

import json
import os
import queue
import re
import sys
import threading
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from tunesmith.core.progress import say
from tunesmith.serve.record import RequestRecord

MOST_WAITING, MOST_WAITING_CHARACTERS = 10_000, 32_000_000
# What a terminal obeys, or shows in another order, when a log is looked at; JSON escapes the others itself.
_UNSEEN = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_END = ""


class AccessLog:
    """Writes lines from a thread of its own: a full disk or a reader that stopped delays no answer.

    file: None for stderr. One that was moved away (log rotation) is opened anew. texts: prompts and answers
    too. Lines that find 10,000 before them, or 32 million characters, are dropped, and their number is
    written later.
    """

    def __init__(self, file: Path | None = None, *, texts: bool = False) -> None:
        self._file, self._texts = file, texts
        self._out = None if file is None else _open(file)
        self._lines: queue.Queue[str] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        # Each is written by one thread only: characters put in line, and taken out of it.
        self._put = self._taken = 0
        self._told = False
        self._thread = threading.Thread(target=self._run, name="tunesmith-access-log", daemon=True)
        self._thread.start()

    def observe(self, record: RequestRecord) -> None:
        """Put an ended request in line."""
        fields = _fields(record)
        if self._texts:
            fields |= {"request": record.request_text, "answer": record.answer_text}
        if self._lines.full() or self._put - self._taken > MOST_WAITING_CHARACTERS:
            self._dropped += 1
            return
        if self._dropped:
            fields["dropped_before"], self._dropped = self._dropped, 0
        line = _line(fields)
        self._put += len(line)
        self._lines.put_nowait(line)

    def close(self) -> None:
        """Write what is in line, for at most five seconds."""
        try:
            self._lines.put(_END, timeout=1)
        except queue.Full:
            return
        self._thread.join(4)

    def _run(self) -> None:
        while (line := self._lines.get()) != _END:
            self._taken += len(line)
            try:
                self._write(line.encode("utf-8", "backslashreplace"))
                self._told = False
            except (OSError, ValueError) as error:
                if not self._told:
                    say(f"warning: the access log cannot be written: {error}")
                self._told = True
        if self._out is not None:
            self._out.close()

    def _write(self, line: bytes) -> None:
        if self._out is None or self._file is None:
            # Not through sys.stderr's buffer: a line is one write, whole beside those of other threads.
            os.write(sys.stderr.fileno(), line)
            return
        if not _is_at(self._out, self._file):
            self._out.close()
            self._out = _open(self._file)
        self._out.write(line)


def _open(file: Path) -> FileIO:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    return FileIO(descriptor, "ab")


def _is_at(out: FileIO, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(out.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _fields(record: RequestRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.time, UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "client": record.client,
        "key": record.key_name,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "duration_s": round(record.duration_s, 4),
    }
    if record.model is not None:
        fields |= {
            "model": record.model,
            "adapter": record.adapter,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "first_token_s": None if record.first_token_s is None else round(record.first_token_s, 4),
            "finish": record.finish,
        }
    if record.error is not None:
        fields["error"] = record.error
    if record.disconnected:
        fields["disconnected"] = True
    return fields


def _line(fields: dict[str, Any]) -> str:
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def answer_text(body: bytes) -> str:
    """The text of an answer as it went out: of a stream its parts put together, choice by choice."""
    texts: dict[int, str] = {}
    for line in body.decode(errors="replace").split("\n"):
        event = _json_object(line.removeprefix("data: "))
        for choice in event.get("choices") or ():
            part = choice.get("delta") or choice.get("message") or choice
            told = part.get("content") or part.get("text") or ""
            texts[choice.get("index", 0)] = texts.get(choice.get("index", 0), "") + told
    return "\n".join(texts.values()) if texts else body.decode(errors="replace")


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
