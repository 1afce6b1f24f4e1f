"""A real endpoint for a while: `tunesmith serve` in a process of its own, asked by the official client."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any

from openai import OpenAI

from tunesmith.core import proc
from tunesmith.core.errors import Interrupted, TunesmithError, UserError
from tunesmith.core.net import post_json, wait_until_ready
from tunesmith.model.batch import IGNORE
from tunesmith.model.template import encode_dialogue
from tunesmith.model.tokenizer import load_tokenizer

START_S = 120.0
ANSWER_S = 120.0
LOOPBACK_S = 5.0
LOG_LINES = 8

Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the endpoint answered to the last message before the expected answer."""

    question: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        return self.answer.strip() == self.expected.strip()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"correct": self.correct}


@dataclass(frozen=True)
class Endpoint:
    """A server that is up: its address, such as http://127.0.0.1:40123, the key that it asks for, its pid."""

    url: str
    api_key: str
    pid: int


def check_loopback() -> None:
    """Raise UserError where this machine cannot speak to itself: the interface 'lo' is down."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            socket.create_connection(listener.getsockname(), timeout=LOOPBACK_S).close()
    except OSError as error:
        raise UserError(
            f"this machine cannot speak to itself over 127.0.0.1, as an endpoint must: {error}",
            hint="sudo ip link set lo up",
        ) from None


@contextmanager
def serving(path: str, *, log: Path, args: Sequence[str] = ()) -> Iterator[Endpoint]:
    """Serve `path` on a free port of this machine, with a key of its own; args: more for the command line.

    The server is stopped whatever happens inside, SIGTERM included. Its output goes to the file `log`.
    Raises TunesmithError with the log's last lines when it does not become ready.
    """
    log.unlink(missing_ok=True)
    key = secrets.token_urlsafe(24)
    command = [
        sys.executable,
        "-m",
        "tunesmith",
        "serve",
        path,
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--json",
        "--keys-file",
        "none",
        *args,
    ]
    with _sigterm_raises():
        # The key travels in the environment: everyone on the machine can read a command line.
        process = proc.start(command, log=log, env=os.environ | {"TUNESMITH_API_KEY": key})
        try:
            url = _url(process, log)
            wait_until_ready(f"{url}/ready", alive=lambda: process.poll() is None, timeout_s=START_S)
            yield Endpoint(url, key, process.pid)
        finally:
            proc.stop(process)


def ask(endpoint: Endpoint, rows: Sequence[Row], *, max_tokens: int) -> list[Answer]:
    """Put each row's messages but the last to the endpoint, greedily; the last is the expected answer."""
    client = OpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.api_key, max_retries=0, timeout=ANSWER_S)
    model = client.models.list().data[0].id
    answers = []
    for row in rows:
        *prompt, expected = row["messages"]
        reply = client.chat.completions.create(
            model=model, messages=prompt, max_tokens=max_tokens, temperature=0.0
        )
        found = reply.choices[0].message.content or ""
        answers.append(Answer(prompt[-1]["content"], expected["content"], found))
    return answers


def same_tokens(endpoint: Endpoint, tokenizer_folder: Path, rows: Sequence[Row]) -> bool:
    """True when the endpoint's prompt of every row is token for token what training put before the answer."""
    tokenizer = load_tokenizer(tokenizer_folder)
    return all(_served_prompt(endpoint, row) == _trained_prompt(tokenizer, row) for row in rows)


def _served_prompt(endpoint: Endpoint, row: Row) -> list[int]:
    body = {"messages": row["messages"][:-1]}
    return list(post_json(f"{endpoint.url}/tokenize", body, api_key=endpoint.api_key)["tokens"])


def _trained_prompt(tokenizer: Any, row: Row) -> list[int]:
    """The tokens of the training rendering before the first supervised one."""
    encoded = encode_dialogue(tokenizer, row["messages"])
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORE)
    return encoded.ids[:first]


def _url(process: proc.Process, log: Path) -> str:
    """The URL in the one JSON object that the server prints when it is ready, as soon as it is in the log."""
    end = monotonic() + START_S
    while monotonic() < end:
        ended = process.poll() is not None
        ready = [found for found in map(_object, _lines(log)) if "url" in found]
        if ready:
            return str(ready[0]["url"])
        if ended:
            break
        sleep(0.1)
    tail = "\n".join(line for line in _lines(log)[-LOG_LINES:] if not _object(line))
    raise TunesmithError(f"the server did not start; its last lines:\n{tail}", hint=f"all of it: {log}")


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def _object(line: str) -> dict[str, Any]:
    """The JSON object that a line is; empty for any other line."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM as an exception, so that `finally` runs; only the main thread can take signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, "stopped while the endpoint was up; the endpoint has been stopped")

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
