"""Which web pages may ask: CORS (Fetch standard, section 3.2), and headers that keep browsers careful."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.core.errors import UserError
from tunesmith.recipe.serving import is_origin
from tunesmith.serve.refuse import header

Headers = list[tuple[bytes, bytes]]

EXPOSED = (
    "x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    "x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, "
    "x-ratelimit-reset-tokens"
)
CAREFUL: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]
"""Set where the application has not set them itself."""


def check_origin(origin: str) -> str:
    """An origin as browsers send it, or `*`. Raises UserError."""
    if is_origin(origin):
        return origin
    raise UserError(
        f"CORS origin '{origin}': is not scheme://host[:port]", hint="try https://chat.example.org, or *"
    )


class Cors:
    """Lets pages of the given origins read answers; a preflight is answered here, without a key.

    Cookies play no part: a page sends its key in a header.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = header(scope, b"origin")
        if origin is None or not self._origins:
            await self._app(scope, receive, send)
            return
        allowed = self._allowed(origin)
        if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method") is not None:
            await _preflight(send, allowed, header(scope, b"access-control-request-headers"))
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exposed = [(b"access-control-expose-headers", EXPOSED.encode())] if allowed else []
                message["headers"] = [*message.get("headers", []), *allowed, *exposed, (b"vary", b"Origin")]
            await send(message)

        await self._app(scope, receive, with_headers)

    def _allowed(self, origin: bytes) -> Headers:
        if "*" in self._origins:
            return [(b"access-control-allow-origin", b"*")]
        known = origin.decode("latin-1") in self._origins
        return [(b"access-control-allow-origin", origin)] if known else []


async def _preflight(send: Send, allowed: Headers, asked: bytes | None) -> None:
    """200 with what is allowed, or 400 for an origin that is not."""
    extra = [
        (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
        (b"access-control-allow-headers", asked or b"authorization, content-type, x-api-key"),
        (b"access-control-max-age", b"600"),
    ]
    body = b"" if allowed else b"this origin is not allowed"
    headers = [
        *allowed,
        *(extra if allowed else []),
        (b"vary", b"Origin, Access-Control-Request-Headers"),
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200 if allowed else 400, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
