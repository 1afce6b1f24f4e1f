"""uvicorn's HTTP connection, with an end to clients that send no whole request or take no answer."""

from __future__ import annotations

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.serve.bodies import Bounds
from tunesmith.serve.errors import ApiError


def _not_http() -> bytes:
    error = ApiError("the request is not valid HTTP", code="invalid_http")
    body = bytes(error.response.body)
    lines = ["HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode() + body


_NOT_HTTP = _not_http()


def bounded_connection(bounds: Bounds) -> type[H11Protocol]:
    """The class for `uvicorn.Config(http=...)`."""

    class Bounded(BoundedConnection):
        header_timeout_s = bounds.header_timeout_s
        send_timeout_s = bounds.send_timeout_s

    return Bounded


class BoundedConnection(H11Protocol):
    """Closes when the headers of a request take long.

    uvicorn waits for ever for the first request of a connection, and for the rest of one whose headers have
    begun: some thousand connections that send a byte a minute would leave no descriptor for others.
    """

    header_timeout_s: float
    send_timeout_s: float
    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _drop_when_unread(transport, self.send_timeout_s)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif not self.transport.is_closing():
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless an answer has begun: a second one would be taken for the next."""
        if self.cycle is not None and not self.cycle.response_complete:
            # The application has a request whose body is broken: its own answer would come too late.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_NOT_HTTP)
        self.transport.close()

    def _await_headers(self) -> None:
        """Counts from the first byte: more bytes give no more time."""
        if self._slow is None:
            self._slow = self.loop.call_later(self.header_timeout_s, self._end)

    def _stop_waiting(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _end(self) -> None:
        self._slow = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def _drop_when_unread(transport: asyncio.Transport, timeout_s: float) -> None:
    """A closed connection stays until its last bytes are taken: the kernel shall not wait for ever."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
