"""Too much, too slow, too long: each refused with its own status, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.unit.serve.asgi import ASK, Client, Words, ask, get
from tunesmith.core.errors import UserError
from tunesmith.serve.bodies import Bounds
from tunesmith.serve.guard import Guard, GuardOptions, guard


def made(words: Words | None = None, **bounds: Any) -> Guard:
    return guard((words or Words()).app, GuardOptions(bounds=Bounds(**bounds)))


def test_a_body_just_at_the_limit_passes_and_one_byte_more_does_not() -> None:
    app = made(max_body_bytes=len(ASK))
    assert ask(app).status == 200
    refused = ask(app, chunks=[ASK + b" "])
    assert refused.status == 413
    assert refused.error["code"] == "request_too_large"
    assert refused.headers["connection"] == "close"


def test_chunks_without_a_length_are_counted() -> None:
    app = made(max_body_bytes=1000)
    whole = ask(app, chunks=[ASK[:10], ASK[10:]], length=False)
    assert whole.status == 200
    assert ask(app, chunks=[b"x" * 400] * 3, length=False).status == 413
    assert app.num_running == 0


def test_a_declared_length_is_refused_before_the_body_is_read() -> None:
    app = made(max_body_bytes=1000)
    refused = ask(app, headers={"content-length": "1000000000000"}, chunks=[b"{}"])
    assert refused.status == 413 and refused.ended


def test_endless_chunks_are_not_read_for_ever() -> None:
    client = Client(chunks=[b"x" * 1_000_000] * 200, length=False)
    reply = asyncio.run(client.run(made(max_body_bytes=1000)))
    assert reply.status == 413 and reply.ended
    assert len(client._chunks) > 150


def test_a_slow_sender_is_cut() -> None:
    app = made(body_timeout_s=0.05)
    refused = ask(app, chunks=[b"{"] * 1000, pause_s=0.02)
    assert refused.status == 408
    assert refused.error["code"] == "body_timeout" and refused.headers["connection"] == "close"
    assert app.num_running == 0


def test_a_client_that_leaves_while_sending_reaches_nothing() -> None:
    async def leave() -> Any:
        client = Client(chunks=[], length=False)
        client.leave()
        return await client.run(app)

    app = made()
    assert asyncio.run(leave()).status == 0
    assert app.num_running == 0


def test_headers_too_many_or_too_long() -> None:
    app = made()
    assert get(app, "/health", headers={f"x-{n}": "1" for n in range(90)}).status == 200
    many = get(app, "/health", headers={f"x-{n}": "1" for n in range(200)})
    assert (many.status, many.error["code"]) == (431, "headers_too_large")
    assert get(app, "/health", headers={"x": "y" * 40_000}).status == 431
    assert get(app, "/" + "y" * 40_000).status == 431


def test_a_body_whose_length_is_said_in_two_ways_is_refused() -> None:
    """A proxy in front may go by the other one, and take the rest for a request of its own."""
    both = {"transfer-encoding": "chunked", "content-length": "5"}
    refused = ask(made(), headers=both, chunks=[ASK])
    assert (refused.status, refused.error["code"]) == (400, "invalid_http")
    assert refused.headers["connection"] == "close"


def test_a_request_that_takes_too_long() -> None:
    app = made(request_timeout_s=0.05)
    late = ask(app, "/hang")
    assert (late.status, late.error["code"]) == (504, "request_timeout")
    assert late.ended and app.num_running == 0


def test_a_stream_that_takes_too_long_ends_with_an_error_event() -> None:
    words = Words()
    words.step.release()
    app = made(words, request_timeout_s=1.0)
    late = ask(app, chunks=[b'{"model": "tiny", "tokens": 2, "stream": true}'])
    assert late.status == 200 and late.ended
    first, last = late.body.strip().split(b"\n\n")
    assert b'"word "' in first and b'"request_timeout"' in last
    assert words.open == 0 and app.num_running == 0


def test_the_applications_own_time_out_is_its_own() -> None:
    async def impatient(scope: Any, receive: Any, send: Any) -> None:
        raise TimeoutError("of the application")

    with pytest.raises(TimeoutError, match="of the application"):
        ask(guard(impatient, GuardOptions()))


def test_a_client_that_reads_nothing_is_given_up() -> None:
    words = Words()
    app = made(words, send_timeout_s=0.05)

    async def stalled() -> None:
        client = Client(chunks=[b'{"model": "tiny", "tokens": 9, "stream": true}'])
        for _ in range(9):
            words.step.release()
        receive: Callable[[], Awaitable[Any]] = client._receive

        async def send(message: Any) -> None:
            await client.reply.take(message)
            if client.reply.body.count(b"word") == 3:
                await asyncio.Event().wait()

        await app(client.scope, receive, send)
        assert client.scope["tunesmith"].error == "client_stalled"
        assert client.scope["tunesmith"].completion_tokens == 3

    asyncio.run(stalled())
    assert words.open == 0 and app.num_running == 0


def test_bounds_are_positive() -> None:
    with pytest.raises(UserError, match="max_body_bytes: 0"):
        Bounds(max_body_bytes=0)
    with pytest.raises(UserError, match="request_timeout_s: nan"):
        Bounds(request_timeout_s=float("nan"))


def test_all_bodies_together_are_bounded() -> None:
    async def many() -> list[int]:
        # Each of them is small enough; the last chunk of none ever comes before all have begun.
        clients = [Client(chunks=[b" " * 400, ASK], length=False, pause_s=0.05) for _ in range(5)]
        replies = await asyncio.gather(*(client.run(app) for client in clients))
        assert all(
            r.error["code"] == "server_busy" and r.headers["retry-after"] == "2"
            for r in replies
            if r.status == 429
        )
        return [reply.status for reply in replies]

    app = made(max_body_bytes=1000, max_arriving_bytes=1500)
    statuses = asyncio.run(many())
    assert statuses.count(429) >= 2
    # What was refused or has been taken in makes room again.
    assert ask(app).status == 200 and asyncio.run(many()).count(429) < 5
