"""One line a request: what is in it, what never is, and that writing it holds nobody up."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serve.asgi import ASK, Client, Words, ask, bearer, get
from tunesmith.serve.access_log import MOST_WAITING, MOST_WAITING_CHARACTERS, AccessLog, answer_text
from tunesmith.serve.bodies import KEPT_TEXT
from tunesmith.serve.guard import GuardOptions, guard
from tunesmith.serve.record import RequestRecord

SECRET = "ts-very-secret-key"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_a_line_says(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "access.jsonl"
    app = guard(Words().app, GuardOptions(api_key=SECRET, access_log=file))
    ask(app, headers=bearer(SECRET) | {"x-request-id": "r1"})
    get(app, "/health", headers={"x-request-id": "a\nb"})
    ask(app, headers=bearer("ts-wrong"), chunks=[b'{"secret prompt"}'])
    app.close()
    good, health, bad = lines(file)
    timed = {name: good.pop(name) for name in ("time", "duration_s", "first_token_s")}
    assert good == {
        "request_id": "r1", "client": "127.0.0.1", "key": "api_key", "method": "POST", "status": 200,
        "path": "/v1/completions", "model": "tiny", "adapter": None, "prompt_tokens": 5, "cached_tokens": 2,
        "completion_tokens": 3, "finish": "stop",
    }  # fmt: skip
    assert timed["time"].endswith("+00:00") and 0 <= timed["first_token_s"] <= timed["duration_s"]
    assert health["path"] == "/health" and "model" not in health
    assert (bad["status"], bad["error"], bad["key"]) == (401, "invalid_api_key", None)
    text = file.read_text()
    assert (
        SECRET not in text and "ts-wrong" not in text and "secret prompt" not in text and "word" not in text
    )


def test_prompts_and_answers_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "access.jsonl"
    words = Words()
    app = guard(words.app, GuardOptions(api_key=SECRET, access_log=file, log_prompts=True))
    ask(app, headers=bearer(SECRET))
    for _ in range(2):
        words.step.release()
    stream = b'{"model": "tiny", "tokens": 2, "stream": true}'
    ask(app, headers=bearer(SECRET), chunks=[stream[:9], stream[9:]])
    app.close()
    whole, streamed = lines(file)
    assert (whole["request"], whole["answer"]) == (ASK.decode(), "word word word ")
    assert (streamed["request"], streamed["answer"]) == (stream.decode(), "word word ")
    assert SECRET not in file.read_text()


def test_a_client_that_left_is_told_of(tmp_path: Path) -> None:
    file = tmp_path / "access.jsonl"
    words = Words()
    app = guard(words.app, GuardOptions(access_log=file))

    async def leave() -> None:
        client = Client(chunks=[b'{"model": "tiny", "tokens": 2, "stream": true}'])
        task = asyncio.create_task(client.run(app))
        words.step.release()
        await client.reply.began.wait()
        client.leave()
        while not client.scope["tunesmith"].disconnected:
            await asyncio.sleep(0)
        words.step.release()
        await task

    asyncio.run(leave())
    ask(app)
    app.close()
    left, stayed = lines(file)
    assert left["disconnected"] is True and "disconnected" not in stayed


def test_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    app = guard(Words().app, GuardOptions(access_log="-"))
    get(app, "/health")
    app.close()
    assert json.loads(capfd.readouterr().err)["path"] == "/health"


def test_a_rotated_file_is_opened_anew(tmp_path: Path) -> None:
    file, old = tmp_path / "access.jsonl", tmp_path / "access.jsonl.1"
    log = AccessLog(file)
    log.observe(RequestRecord(path="/1"))
    while not file.stat().st_size:
        os.sched_yield()
    file.rename(old)
    log.observe(RequestRecord(path="/2"))
    log.close()
    assert [line["path"] for line in lines(old) + lines(file)] == ["/1", "/2"]
    assert old.stat().st_mode & 0o777 & ~0o640 == 0


def test_a_reader_that_stopped_holds_nobody_up(tmp_path: Path) -> None:
    """A named pipe that nobody empties takes 64 KiB; the lines after that wait, and then are dropped."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(pipe)
    for number in range(MOST_WAITING + 2000):
        log.observe(RequestRecord(path=f"/{number}"))
    dropped = log._dropped
    assert dropped > 0
    os.set_blocking(reader, True)
    taken = b""
    while b"/last" not in taken:
        taken += os.read(reader, 1 << 16)
        if not log._lines.full() and b"/last" not in taken:
            log.observe(RequestRecord(path="/last"))
    log.close()
    while taken.count(b"dropped_before") == 0:
        taken += os.read(reader, 1 << 16)
    os.close(reader)
    assert b'"dropped_before":' + str(dropped).encode() in taken


def test_long_lines_that_wait_are_bounded_together(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(pipe, texts=True)
    record = RequestRecord(request_text="x" * 1_000_000)
    for _ in range(100):
        log.observe(record)
    # Beside those in line, one may be on its way.
    assert 100 - log._dropped <= MOST_WAITING_CHARACTERS / 1_000_000 + 2
    os.close(reader)
    log.close()


def test_a_full_disk_is_told_once_and_stops_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    log = AccessLog(Path("/dev/full"))
    for _ in range(3):
        log.observe(RequestRecord(path="/x"))
    log.close()
    assert capfd.readouterr().err.count("the access log cannot be written") == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"choices":[{"index":0,"message":{"role":"assistant","content":"hi"}}]}', "hi"),
        (b'{"choices":[{"index":0,"text":"a"},{"index":1,"text":"b"}]}', "a\nb"),
        (b'data: {"choices":[{"index":0,"delta":{"content":null}}]}\n\ndata: [DONE]\n\n', ""),
        (b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\ndata: {"choi', "x"),
        (b'{"data": [1]}', '{"data": [1]}'),
        (b"[1]", "[1]"),
    ],
)
def test_the_text_of_answers(body: bytes, text: str) -> None:
    assert answer_text(body) == text


def test_what_a_terminal_would_obey_is_escaped(tmp_path: Path) -> None:
    file = tmp_path / "access.jsonl"
    app = guard(Words().app, GuardOptions(access_log=file))
    odd = "/v1/\x9b31m\x7f\u202egpj.exe\u2028{\x1b]0;x\x07"
    get(app, odd)
    app.close()
    assert lines(file)[0]["path"] == odd
    assert file.read_text().isascii() and file.read_text().count("\n") == 1


def test_a_long_answer_is_kept_only_in_part(tmp_path: Path) -> None:
    file, words = tmp_path / "access.jsonl", Words()
    app = guard(words.app, GuardOptions(access_log=file, log_prompts=True))
    ask(app, chunks=[b'{"model": "tiny", "tokens": 1000000}'])
    app.close()
    assert len(lines(file)[0]["answer"]) == KEPT_TEXT
