"""The gateway in another process: requests are forwarded to it as plain data, and played to it there.

`forwarding` makes an application that asks some replica; `replay` has the replica's application answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.serve.bodies import BoundedBody, BoundedHeaders, Bounds
from tunesmith.serve.errors import ApiError
from tunesmith.serve.refuse import refuse

PREFIX_CHARS = 512
LAST_WORDS_S = 5.0


class ReplicaLost(Exception):
    """The replica that was asked has died, or there is none."""


@dataclass(frozen=True)
class Call:
    """A request, whole. key: requests with the same one had better go to the same replica; "" for any."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    body: bytes
    key: str = ""

    @property
    def scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": self.headers,
            "client": self.client,
            "server": None,
        }


Ask = Callable[[Call], AsyncIterator[Message]]
"""The messages of some replica's answer. Raises ReplicaLost."""


def call_of(scope: Scope, body: bytes) -> Call:
    client = scope.get("client")
    return Call(
        method=scope["method"],
        path=scope["path"],
        query=scope["query_string"],
        headers=[(bytes(name), bytes(value)) for name, value in scope["headers"]],
        client=None if client is None else (client[0], client[1]),
        body=body,
        key=routing_key(body),
    )


def routing_key(body: bytes) -> str:
    """The same for requests to the same model whose prompts begin alike, in their first PREFIX_CHARS.

    A replica that has answered one need not compute that beginning again. "" for what has no prompt.
    """
    try:
        asked = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(asked, dict):
        return ""
    prompt = next((asked[name] for name in ("messages", "prompt", "input") if asked.get(name)), None)
    if prompt is None:
        return ""
    begins = json.dumps([asked.get("tools"), prompt], ensure_ascii=False)[:PREFIX_CHARS]
    return hashlib.sha256(f"{asked.get('model')}\n{begins}".encode()).hexdigest()


def forwarding(ask: Ask, bounds: Bounds) -> ASGIApp:
    """An application whose answers come from replicas, with `bounds` for what it takes in."""
    http = BoundedHeaders(BoundedBody(Forward(ask), bounds), bounds)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    return app


class Forward:
    """Asks a replica for each request, whose body has come.

    A request whose replica dies is asked again, once, when nothing of an answer has come; else the client
    gets an error object, in a stream as its last event.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        sent = _Sent(send)
        answer = asyncio.ensure_future(self._answer(call_of(scope, body), sent))
        leaving = asyncio.ensure_future(_until_left(receive))
        try:
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answer.done():
                answer.cancel()
        with suppress(asyncio.CancelledError):
            if (lost := await answer) is not None:
                await _tell(lost, scope, receive, sent)

    async def _answer(self, call: Call, sent: _Sent) -> ReplicaLost | None:
        """Send on what a replica answers; the failure, where none could answer to the end."""
        for last in (False, True):
            try:
                async for message in self._ask(call):
                    await sent(message)
                return None
            except ReplicaLost as error:
                if last or sent.began:
                    return error
        return None


class _Sent:
    """Sends on, and holds a status back until the first of its body: only then is there an answer."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self.began = self.is_event_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is not None:
            kind = dict(self._start["headers"]).get(b"content-type", b"")
            self.began, self.is_event_stream = True, kind.startswith(b"text/event-stream")
            await self._send(self._start)
            self._start = None
        await self._send(message)

    async def fresh(self, message: Message) -> None:
        """Send in place of what was held back."""
        self._start = None
        await self._send(message)


async def _tell(lost: ReplicaLost, scope: Scope, receive: Receive, sent: _Sent) -> None:
    message = f"the replica that was answering has ended: {lost}" if sent.began else str(lost)
    error = ApiError(message, status=503, code="replica_lost" if sent.began else "engine_unavailable")
    if not sent.began:
        await refuse(scope, receive, sent.fresh, error)
    elif sent.is_event_stream:
        await sent({"type": "http.response.body", "body": error.event, "more_body": False})
    else:
        raise lost  # a part of an object is out: only a broken connection tells that it is not whole


async def replay(app: ASGIApp, call: Call) -> AsyncIterator[Message]:
    """The messages by which `app` answers; it is told that the client has left when nobody takes them."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=64)
    left, waiting = asyncio.Event(), [call.body]

    async def receive() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def answer() -> None:
        try:
            await app(call.scope, receive, messages.put)
        finally:
            await messages.put(None)

    task = asyncio.ensure_future(answer())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await task
    finally:
        left.set()
        if not task.done():
            await asyncio.wait({task, asyncio.ensure_future(_drained(messages))}, timeout=LAST_WORDS_S)
            task.cancel()


async def _drained(messages: asyncio.Queue[Message | None]) -> None:
    while await messages.get() is not None:
        pass


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _live(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return
