"""The whole guard: request ids, drain, the server's lifespan, and what is no HTTP request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serve.asgi import Client, Words, ask, get
from tunesmith.serve.guard import GuardOptions, guard


def test_a_request_id_is_taken_or_made_and_returned_once() -> None:
    app = guard(Words().app, GuardOptions())
    assert get(app, "/health", headers={"X-Request-Id": "my-id_1"}).headers["x-request-id"] == "my-id_1"
    for bad in ("", "a b", "x" * 129, "a\x01", "ü"):
        made = get(app, "/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made.startswith("req-") and len(made) == 36
    ids = {get(app, "/nothing").headers["x-request-id"] for _ in range(50)}
    assert len(ids) == 50


def test_the_record_of_a_request() -> None:
    async def once() -> Any:
        client = Client(headers={"traceparent": "00-0-0-01"})
        await client.run(guard(Words().app, GuardOptions()))
        return client.scope["tunesmith"]

    record = asyncio.run(once())
    assert (record.model, record.prompt_tokens, record.cached_tokens) == ("tiny", 5, 2)
    assert (record.completion_tokens, record.finish, record.status) == (3, "stop", 200)
    assert 0 <= record.first_token_s <= record.duration_s
    assert (record.client, record.route, record.trace_parent) == (
        "127.0.0.1", "/v1/completions", "00-0-0-01",
    )  # fmt: skip


def test_while_draining_new_requests_are_refused_and_old_ones_finish() -> None:
    words = Words()
    app = guard(words.app, GuardOptions())

    async def everything() -> None:
        running = Client(chunks=[b'{"model": "tiny", "tokens": 2, "stream": true}'])
        task = asyncio.create_task(running.run(app))
        while not words.open:
            await asyncio.sleep(0)
        app.drain(retry_after_s=7)
        refused = await Client().run(app)
        assert (refused.status, refused.error["code"]) == (503, "server_draining")
        assert refused.headers["retry-after"] == "7" and refused.headers["connection"] == "close"
        for path in ("/health", "/metrics"):
            assert (await Client(path, method="GET").run(app)).status == 200
        assert app.num_running == 1
        words.step.release()
        words.step.release()
        assert (await task).body.count(b"word") == 2
        assert app.num_running == 0

    asyncio.run(everything())


def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def reached(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    app = guard(reached, GuardOptions())
    asyncio.run(app({"type": "websocket", "path": "/"}, send, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_the_end_of_the_lifespan_writes_what_waits(tmp_path: Path) -> None:
    log = tmp_path / "access.jsonl"
    app = guard(Words().app, GuardOptions(access_log=log))
    get(app, "/health")
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[tuple[str, bool]] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append((message["type"], "/health" in log.read_text()))

    asyncio.run(app({"type": "lifespan", "state": {}}, receive, send))
    assert sent[-1] == ("lifespan.shutdown.complete", True)
    app.close()


def test_a_failure_of_the_application_is_answered_and_goes_on_to_the_server() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a bug")

    client = Client()
    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(client.run(guard(broken, GuardOptions())))
    assert client.scope["tunesmith"].status == 500


def test_a_head_request_and_unknown_methods_pass() -> None:
    app = guard(Words().app, GuardOptions())
    assert ask(app, "/health", method="HEAD").status == 405
    assert ask(app, "/metrics", method="HEAD").status == 200
