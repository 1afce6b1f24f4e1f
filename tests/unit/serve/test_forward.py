"""Requests forwarded to replicas, against real applications in place of a cluster's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message

from tunesmith.serve.bodies import Bounds
from tunesmith.serve.forward import Call, ReplicaLost, forwarding, replay, routing_key

BOUNDS = Bounds(max_body_bytes=1000)


async def echo(request: Request) -> Response:
    body = (await request.body()).decode()
    return JSONResponse(
        {"path": request.url.path, "query": str(request.url.query), "body": body, "x": request.headers["x"]},
        status_code=201,
    )


async def numbers(_: Request) -> Response:
    async def events() -> AsyncIterator[bytes]:
        for number in range(3):
            yield b"data: %d\n\n" % number

    return StreamingResponse(events(), media_type="text/event-stream")


APP = Starlette(routes=[Route("/echo", echo, methods=["POST"]), Route("/numbers", numbers)])


def asked(app: ASGIApp, method: str, path: str, **more: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask())


def played(call: Call) -> AsyncIterator[Message]:
    return replay(APP, call)


def lost_after(count: int, times: int) -> Callable[[Call], AsyncIterator[Message]]:
    """As `played`, but the first `times` answers end after `count` messages."""
    left = [times]

    async def ask(call: Call) -> AsyncIterator[Message]:
        left[0] -= 1
        said = 0
        async for message in replay(APP, call):
            if left[0] >= 0 and said == count:
                raise ReplicaLost("it was killed")
            said += 1
            yield message

    return ask


def test_a_request_arrives_whole_and_so_does_its_answer() -> None:
    answer = asked(forwarding(played, BOUNDS), "POST", "/echo?a=1", content="ä", headers={"x": "y"})
    assert answer.status_code == 201
    assert answer.json() == {"path": "/echo", "query": "a=1", "body": "ä", "x": "y"}
    assert asked(forwarding(played, BOUNDS), "GET", "/numbers").text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
    assert asked(forwarding(played, BOUNDS), "GET", "/none").status_code == 404


def test_what_is_too_large_reaches_no_replica() -> None:
    def ask(call: Call) -> AsyncIterator[Message]:
        raise AssertionError(call.path)

    answer = asked(forwarding(ask, BOUNDS), "POST", "/echo", content="a" * 1001)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("count", [0, 1])
def test_before_an_answer_begins_another_replica_is_asked(count: int) -> None:
    """A status alone is no answer yet."""
    answer = asked(forwarding(lost_after(count, 1), BOUNDS), "GET", "/numbers")
    assert answer.status_code == 200 and answer.text.endswith("data: 2\n\n")


def test_a_second_loss_is_told() -> None:
    answer = asked(forwarding(lost_after(1, 2), BOUNDS), "GET", "/numbers")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert answer.headers["retry-after"] == "1"


def test_a_stream_that_is_cut_ends_with_the_error() -> None:
    answer = asked(forwarding(lost_after(3, 1), BOUNDS), "GET", "/numbers")
    first, second, error = answer.text.strip().split("\n\n")
    assert (first, second) == ("data: 0", "data: 1")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_who_leaves_is_not_answered_on() -> None:
    """The application learns that the client has left, and the replica's messages are not awaited for ever."""
    seen: list[str] = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.ensure_future(receive())
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        seen.append((await leaving)["type"])

    async def leave() -> None:
        call = Call("GET", "/", b"", [], None, b"")
        answer = replay(endless, call)
        async for message in answer:
            if message["type"] == "http.response.body":
                break
        await answer.aclose()  # type: ignore[attr-defined]

    asyncio.run(asyncio.wait_for(leave(), 20))
    assert seen == ["http.disconnect"]


def test_the_front_stops_asking_when_the_client_leaves() -> None:
    ended = asyncio.Event()

    async def ask(call: Call) -> AsyncIterator[Message]:
        try:
            yield {"type": "http.response.start", "status": 200, "headers": []}
            while True:
                yield {"type": "http.response.body", "body": b"x", "more_body": True}
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def visit() -> None:
        came: list[Message] = []
        coming: list[Message] = [{"type": "http.disconnect"}, {"type": "http.request", "body": b""}]

        async def receive() -> Message:
            if len(coming) == 1:
                while len(came) < 3:
                    await asyncio.sleep(0)
            return coming.pop()

        async def send(message: Message) -> None:
            came.append(message)

        call = Call("GET", "/", b"", [], None, b"")
        await forwarding(ask, BOUNDS)(call.scope, receive, send)
        await ended.wait()

    asyncio.run(asyncio.wait_for(visit(), 20))


def test_the_key_is_that_of_the_beginning() -> None:
    def key(**body: Any) -> str:
        return routing_key(json.dumps(body).encode())

    system = {"role": "system", "content": "s" * 600}
    first, second = ({"role": "user", "content": text} for text in ("one", "two"))
    assert key(model="a", messages=[system, first]) == key(model="a", messages=[system, second])
    assert key(model="a", messages=[system, first]) != key(model="b", messages=[system, first])
    assert key(model="a", messages=[first]) != key(model="a", messages=[second])
    assert key(model="a", prompt="x") and key(model="a", input=["x"])
    assert key(model="a") == routing_key(b"") == routing_key(b"[1]") == routing_key(b"\xff") == ""
