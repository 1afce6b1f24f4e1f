"""Who may do what: keys, admin paths, and what only this machine may see."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.serve.admin import is_admin
from tunesmith.serve.errors import ApiError, shown
from tunesmith.serve.keys import Key, Keyring
from tunesmith.serve.limits import KEY
from tunesmith.serve.record import record_of
from tunesmith.serve.refuse import header, refuse, route_path

OPEN_PATHS = frozenset({"/health", "/ready"})
METRICS_PATH = "/metrics"
_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via")


class Keyed:
    """Lets a request pass when its key may do what it asks.

    Without any key configured everything is open but the admin paths, which are for this machine alone, and
    but to web pages: no page that a browser here shows may use a model that its author could not reach.
    metrics_open: whether everybody may read the metrics; else this machine may, and holders of a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring,
        *,
        open_paths: Collection[str] = (),
        metrics_open: bool = False,
        origins: Collection[str] = (),
    ) -> None:
        self._app, self._keyring = app, keyring
        self._open = OPEN_PATHS.union(open_paths, {METRICS_PATH} if metrics_open else ())
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except ApiError as error:
            await refuse(scope, receive, send, error)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Puts the key into the scope. Raises ApiError 401 and 403."""
        path = route_path(scope)
        if path in self._open or (path == METRICS_PATH and self._is_local(scope)):
            return
        admin = is_admin(path)
        if not self._keyring.asks:
            if admin and not self._is_local(scope):
                raise _forbidden("this path wants an admin key, or a request from the server's own machine")
            self._refuse_pages(scope)
            return
        key = self._key(scope)
        record = record_of(scope)
        scope[KEY], record.key_name = key, key.name
        record.models = None if key.models is None else frozenset(key.models)
        if admin and not key.admin:
            raise _forbidden(f"the API key '{key.name}' is not an admin's")

    def _key(self, scope: Scope) -> Key:
        given = _given_key(scope)
        if given is None:
            raise _unauthorized("an API key is needed: 'Authorization: Bearer KEY'", "missing_api_key")
        key = self._keyring.find(given)
        if key is None:
            raise _unauthorized("the API key is not correct", "invalid_api_key")
        if key.expired():
            raise _unauthorized(f"the API key '{key.name}' has expired", "expired_api_key")
        return key

    def _refuse_pages(self, scope: Scope) -> None:
        """Raises ApiError 403 for what a browser sends in the name of a page from elsewhere."""
        client, host = scope.get("client"), header(scope, b"host") or b""
        if client is not None and _is_loopback(client[0]) and not _is_plain(_host_of(host)):
            raise ApiError(
                f"the host name {shown(_host_of(host))} is not this machine's: without an API key this "
                "server answers its own machine only under localhost or an address",
                status=403,
                code="host_not_allowed",
            )
        origin = (header(scope, b"origin") or b"").decode("latin-1")
        page = origin.partition("://")[2] if origin.startswith(("http://", "https://")) else ""
        same = page == host.decode("latin-1")
        if page and not same and not _is_loopback(_host_of(page.encode("latin-1"))):
            if origin in self._origins or "*" in self._origins:
                return
            raise ApiError(
                f"pages of {shown(origin)} may not use this server: name the origin among its CORS origins",
                status=403,
                code="origin_not_allowed",
            )

    def _is_local(self, scope: Scope) -> bool:
        """Whether a program on this machine asks; not a page in its browser, and not a proxy for others."""
        client, origin = scope.get("client"), header(scope, b"origin")
        return (
            client is not None
            and _is_loopback(client[0])
            and _is_loopback(_host_of(header(scope, b"host")))
            and not any(header(scope, name) is not None for name in _FORWARDED)
            and (origin is None or origin.decode("latin-1") in self._origins)
        )


def _given_key(scope: Scope) -> bytes | None:
    kind, _, key = (header(scope, b"authorization") or b"").partition(b" ")
    if kind.lower() == b"bearer" and key.strip():
        return key.strip()
    return header(scope, b"x-api-key")


def _host_of(given: bytes | None) -> str:
    """The name in a Host header. A page that has its own name resolve to 127.0.0.1 still sends that name."""
    text = (given or b"").decode("latin-1")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _is_plain(host: str) -> bool:
    """Whether it is a name that nobody elsewhere can have resolve to this machine."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.lower().endswith((".localhost", ".local", ".internal"))
    return True


def _is_loopback(host: str) -> bool:
    try:
        address: Any = ipaddress.ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return bool(address.is_loopback)
    except ValueError:
        return host.lower() == "localhost"


def _unauthorized(message: str, code: str) -> ApiError:
    return ApiError(message, status=401, code=code)


def _forbidden(message: str) -> ApiError:
    return ApiError(message, status=403, code="admin_key_required")
