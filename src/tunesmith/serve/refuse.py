"""Answering with an error before the application has seen the request, whose body may still be on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from tunesmith.serve.errors import ApiError
from tunesmith.serve.record import record_of

SMALL_BODY = 64 * 1024
LINGER_BYTES, LINGER_S = 16 * 1024 * 1024, 2.0


class Refused(ApiError):
    """An error with more headers; kind: its `type`, where it is not the one that its status has."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        retry_after_s: int | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, status=status, code=code, retry_after_s=retry_after_s)
        self.kind, self.headers = kind, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        whole = super().body
        if self.kind is not None:
            whole["error"]["type"] = self.kind
        return whole


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header, whose name is given in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


def route_path(scope: Scope) -> str:
    """The path that the application routes by: without the prefix under which a proxy offers the server."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def has_body(scope: Scope) -> bool:
    return header(scope, b"transfer-encoding") is not None or content_length(scope) not in (None, 0)


def content_length(scope: Scope) -> int | None:
    given = header(scope, b"content-length")
    return int(given) if given is not None and given.isdigit() else None


async def refuse(scope: Scope, receive: Receive, send: Send, error: ApiError, *, close: bool = False) -> None:
    """Send an error. The connection stays usable when the body has come whole, unless `close`."""
    record_of(scope).error = error.code
    whole = not close and await _takes_small_body(scope, receive)
    extra = error.headers if isinstance(error, Refused) else {}
    response = error.response
    start: Message = {
        "type": "http.response.start",
        "status": error.status,
        "headers": [*response.raw_headers, *_encoded(extra), *([] if whole else [(b"connection", b"close")])],
    }
    await send(start)
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": not whole})
    if not whole:
        # Closing at once would reset the connection of a client that is still sending: it would see a broken
        # pipe in place of the answer.
        await _discard(receive, LINGER_BYTES)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _takes_small_body(scope: Scope, receive: Receive) -> bool:
    if not has_body(scope):
        return True
    length = content_length(scope)
    if length is None or length > SMALL_BODY or header(scope, b"expect") is not None:
        return False
    return await _discard(receive, SMALL_BODY)


async def _discard(receive: Receive, most: int) -> bool:
    """Whether the rest of the body came, was not more than `most` bytes, and did not take long."""
    try:
        async with asyncio.timeout(LINGER_S):
            while most >= 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return message["type"] == "http.request"
                most -= len(message.get("body", b""))
    except TimeoutError:
        pass
    return False


def _encoded(headers: Mapping[str, str]) -> Iterable[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
