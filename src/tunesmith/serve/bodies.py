"""Bounds in size and time: of headers, of a body, of the whole request, and of a client's reading."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.core.errors import UserError
from tunesmith.core.units import bytes_text
from tunesmith.serve.errors import ApiError
from tunesmith.serve.record import record_of
from tunesmith.serve.refuse import content_length, has_body, header, refuse

KEPT_TEXT = 64 * 1024
"""Most bytes of a request, and of an answer, that are kept for a log with prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """What one request may take.

    header_timeout_s: for the headers to arrive (see connections.py). max_body_bytes: of the body;
    max_arriving_bytes: of all bodies together that have begun to arrive.
    body_timeout_s: for the body to arrive. request_timeout_s: from the first byte to the last of the answer.
    send_timeout_s: for the client to take what is sent, each time. max_headers, max_header_bytes: lines, and
    names and values together with the path. max_requests: that the whole gateway has under way, in line or
    running.
    """

    header_timeout_s: float = 30.0
    max_body_bytes: int = 8 * 1024 * 1024
    max_arriving_bytes: int = 512 * 1024 * 1024
    body_timeout_s: float = 60.0
    request_timeout_s: float = 3600.0
    send_timeout_s: float = 120.0
    max_headers: int = 100
    max_header_bytes: int = 32 * 1024
    max_requests: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"{field.name}: {getattr(self, field.name)} is not more than 0")


class BoundedHeaders:
    """Refuses requests with very many or very long headers, or a very long path, or with two lengths.

    A proxy that goes by the other length than we do would take the rest of the body for a second request,
    which it has not looked at (RFC 9112, section 6.3).
    """

    def __init__(self, app: ASGIApp, bounds: Bounds) -> None:
        self._app, self._bounds = app, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except ApiError as error:
            await refuse(scope, receive, send, error, close=True)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
        if size > self._bounds.max_header_bytes or len(scope["headers"]) > self._bounds.max_headers:
            raise ApiError(
                f"the headers have {len(scope['headers'])} lines and with the path {size} bytes; this server "
                f"takes {self._bounds.max_headers} lines and {self._bounds.max_header_bytes} bytes",
                status=431,
                code="headers_too_large",
            )
        lengths = [header(scope, name) for name in (b"transfer-encoding", b"content-length")]
        if None not in lengths:
            raise ApiError("Content-Length and Transfer-Encoding: give one of them", code="invalid_http")


class BoundedBody:
    """Takes the body in before the application sees the request, and refuses a large or a slow one.

    keep_text: the record gets the body, for a log with prompts.
    """

    def __init__(self, app: ASGIApp, bounds: Bounds, *, keep_text: bool = False) -> None:
        self._app, self._bounds, self._keep_text = app, bounds, keep_text
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not has_body(scope):
            await self._app(scope, receive, send)
            return
        incoming = _Incoming(receive)
        try:
            body = await self._read(scope, incoming)
        except ApiError as error:
            await refuse(scope, incoming, send, error, close=True)
            return
        if body is None:
            return  # The client has left: there is nobody to answer.
        if self._keep_text:
            record_of(scope).request_text = body[:KEPT_TEXT].decode(errors="replace")
        await self._app(scope, _replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when the client left. Raises ApiError 413, 408 and 429."""
        if (content_length(scope) or 0) > self._bounds.max_body_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._bounds.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    body += part
                    self._arriving += len(part)
                    self._check(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                f"the body did not arrive within {self._bounds.body_timeout_s:g} s",
                status=408,
                code="body_timeout",
            ) from None
        finally:
            self._arriving -= len(body)

    def _check(self, size: int) -> None:
        if size > self._bounds.max_body_bytes:
            raise self._too_large()
        if self._arriving > max(self._bounds.max_arriving_bytes, self._bounds.max_body_bytes):
            message = "the server is taking in as much as it can; try again soon"
            raise ApiError(message, status=429, code="server_busy", retry_after_s=2)

    def _too_large(self) -> ApiError:
        most = self._bounds.max_body_bytes
        message = f"the body is larger than {bytes_text(most)} ({most} bytes), the most this server takes"
        return ApiError(message, status=413, code="request_too_large")


class _Incoming:
    """A body on its way; once it is whole, nobody waits for more of it."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._whole = receive, False

    async def __call__(self) -> Message:
        if self._whole:
            return {"type": "http.request", "body": b"", "more_body": False}
        message = await self._receive()
        self._whole = message["type"] == "http.request" and not message.get("more_body", False)
        return message


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the whole body once, then whatever else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


class ClientStalled(BaseException):
    """The client does not take what is sent to it.

    Like a cancellation, it is no failure that the application's handlers should see, tell of or answer.
    """


class BoundedTime:
    """Ends requests that take too long in all, and those whose client does not read its answer.

    A stream that has begun gets the error as its last event.
    """

    def __init__(self, app: ASGIApp, bounds: Bounds) -> None:
        self._app, self._bounds = app, bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        patient = _PatientSend(send, self._bounds.send_timeout_s)
        try:
            async with asyncio.timeout(self._bounds.request_timeout_s) as whole:
                await self._app(scope, receive, patient)
        except ClientStalled:
            record_of(scope).error, record_of(scope).disconnected = "client_stalled", True
        except TimeoutError:
            if not whole.expired():
                raise
            await self._tell(scope, receive, patient)

    async def _tell(self, scope: Scope, receive: Receive, send: _PatientSend) -> None:
        limit_s = self._bounds.request_timeout_s
        message = f"the request took longer than {limit_s:g} s"
        error = ApiError(message, status=504, code="request_timeout")
        record_of(scope).error = error.code
        if not send.started:
            await refuse(scope, receive, send, error, close=True)
        elif send.is_event_stream and not send.ended:
            await send({"type": "http.response.body", "body": error.event, "more_body": False})


class _PatientSend:
    """Sends, but waits only so long for the client. Raises ClientStalled."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send, self._timeout_s = send, timeout_s
        self.started = self.ended = self.is_event_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            kinds = [value for name, value in message.get("headers", []) if name.lower() == b"content-type"]
            self.is_event_stream = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        try:
            async with asyncio.timeout(self._timeout_s) as this:
                await self._send(message)
        except TimeoutError:
            if this.expired():
                raise ClientStalled from None
            raise
