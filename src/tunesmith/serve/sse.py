"""Server-sent events, and what a client's leaving does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
BREAKS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""JSON lets text hold them, but many clients take them for the end of a line, and half an event for one."""


def encode(value: Any, *, name: str | None = None) -> bytes:
    """A value as one event."""
    head = f"event: {name}\n" if name else ""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if not text.isascii():
        text = text.translate(BREAKS)
    return f"{head}data: {text}\n\n".encode()


@asynccontextmanager
async def when_disconnected(receive: Receive, act: Callable[[], None]) -> AsyncIterator[None]:
    """Inside, `act` is called when the client goes away; the request's body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        act()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


class EventStream(Response):
    """Sends chunks as they come; when the client leaves, `cancel` is called, and at the end in any case."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], cancel: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # The length of an empty body, which Response has set.
        del self.headers["content-length"]
        self._chunks, self._cancel = chunks, cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with when_disconnected(receive, self._cancel):
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                async for chunk in self._chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._cancel()
