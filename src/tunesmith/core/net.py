"""The only place that speaks HTTP: JSON calls, and byte streams for downloads."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from tunesmith.core.errors import TunesmithError, UserError

MAX_REDIRECTS = 10
MAX_JSON_BYTES = 256 * 1024**2
REDIRECTS = (301, 302, 303, 307, 308)


class NetError(TunesmithError):
    """No good answer from a server. `status`: its HTTP status, None when the connection itself failed."""

    def __init__(
        self,
        what: str,
        *,
        status: int | None = None,
        code: str = "",
        retry_after_s: float | None = None,
        refused: bool = False,
    ) -> None:
        super().__init__(what)
        self.status, self.code, self.retry_after_s, self.refused = status, code, retry_after_s, refused


@dataclass(frozen=True)
class Reply:
    """An answer whose body is still to come.

    headers: of the last hop, names in lower case; own_headers: of the hops on the host that was asked,
    the first word counting, because a store that is redirected to speaks of its own objects.
    """

    status: int
    headers: dict[str, str]
    own_headers: dict[str, str]
    chunks: Iterator[bytes]


def shown(url: str) -> str:
    """The URL without user, password and query: those may hold secrets."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def origin(url: str) -> tuple[str, str, int | None]:
    """(scheme, host, port): what has to be the same for a secret to be sent along."""
    parts = urlsplit(url)
    return (
        parts.scheme,
        (parts.hostname or "").lower(),
        parts.port or {"https": 443, "http": 80}.get(parts.scheme),
    )


class Http:
    """A pool of connections, for use from several threads. Timeouts are seconds without any byte."""

    def __init__(self, *, connect_timeout_s: float = 5.0, read_timeout_s: float = 10.0) -> None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs, signatures included
        try:
            self._client = httpx.Client(
                timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s, pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
                headers={"User-Agent": "tunesmith", "Accept-Encoding": "identity"},
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise UserError(
                f"the proxy settings of this shell cannot be used: {error}",
                hint="correct $HTTPS_PROXY, $HTTP_PROXY and $ALL_PROXY, or unset them",
            ) from None

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def open(
        self,
        url: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> Iterator[Reply]:
        """Ask for `url` and yield the answer before its body. `secrets`: headers for that host alone.

        Redirects are followed; the secrets stay behind as soon as one leaves the host, port or scheme.
        Raises NetError when the connection fails, also later while the chunks are read, and for a status
        of 400 and above.
        """
        sent, home = dict(secrets or {}), origin(url)
        own: dict[str, str] = {}
        at = url
        try:
            for _ in range(MAX_REDIRECTS):
                request = self._client.build_request(method, at, headers={**(headers or {}), **sent})
                answer = self._client.send(request, stream=True, follow_redirects=False)
                try:
                    if origin(at) == home:
                        own = {**answer.headers, **{k: v for k, v in own.items() if k.startswith("x-")}}
                    target = answer.headers.get("location")
                    if answer.status_code not in REDIRECTS or not target:
                        _raise_for_status(answer, at)
                        yield Reply(answer.status_code, dict(answer.headers), own, answer.iter_bytes())
                        return
                    at = str(answer.url.join(target))
                    sent = sent if origin(at) == home else {}
                finally:
                    answer.close()
            raise NetError(f"{shown(url)}: more than {MAX_REDIRECTS} redirects")
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            text = str(error).strip().splitlines()
            raise NetError(
                f"{shown(at)}: {_plain_reason(error, text[0] if text else '')}",
                refused=isinstance(error, httpx.ConnectError | httpx.ConnectTimeout),
            ) from None

    def get_json(self, url: str, *, secrets: Mapping[str, str] | None = None) -> tuple[Any, dict[str, str]]:
        """(value, headers) of a JSON answer. Raises NetError when there is none."""
        with self.open(url, headers={"Accept": "application/json"}, secrets=secrets) as reply:
            body = bytearray()
            for chunk in reply.chunks:
                body += chunk
                if len(body) > MAX_JSON_BYTES:
                    raise NetError(f"{shown(url)}: the answer is larger than {MAX_JSON_BYTES} bytes")
        try:
            return httpx.Response(200, content=bytes(body)).json(), reply.headers
        except (ValueError, UnicodeDecodeError):
            raise NetError(f"{shown(url)}: the answer is no JSON", status=reply.status) from None


def _plain_reason(error: Exception, text: str) -> str:
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection within the time limit"
    if isinstance(error, httpx.TimeoutException):
        return "no answer within the time limit"
    return text[:200] or type(error).__name__


def _raise_for_status(answer: httpx.Response, url: str) -> None:
    status = answer.status_code
    if status < 400:
        return
    raise NetError(
        f"{shown(url)}: answers with status {status}",
        status=status,
        code=answer.headers.get("x-error-code", "")[:80],
        retry_after_s=_retry_after(answer.headers.get("retry-after", "")),
    )


def _retry_after(text: str) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date (RFC 9110, 10.2.3)."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def post_json(url: str, body: Any, *, timeout_s: float = 60.0, api_key: str | None = None) -> Any:
    """POST a JSON body and return the JSON answer. Raises TunesmithError when there is no good answer."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.post(url, json=body, timeout=timeout_s, headers=headers)
        answer.raise_for_status()
        return answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise TunesmithError(f"{url}: {error}") from None


def wait_until_ready(url: str, *, alive: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait until GET `url` answers 200; give up when `alive()` says that the server has ended."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if httpx.get(url, timeout=5.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if not alive():
            raise TunesmithError(f"the server behind {url} ended before it was ready")
        time.sleep(0.2)
    raise TunesmithError(f"{url} was not ready after {timeout_s:g} s")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def local_status(url: str, *, headers: Mapping[str, str] | None = None, timeout_s: float = 5.0) -> int | None:
    """The HTTP status of GET `url` on this machine, past any proxy; None when nothing answers."""
    try:
        return httpx.get(url, headers=dict(headers or {}), timeout=timeout_s, trust_env=False).status_code
    except httpx.HTTPError:
        return None


class EventClient:
    """A pool of connections to one server, on one event loop, for answers that come as server-sent events.

    api_key: sent as a bearer token. The shell's proxy is not asked: the server is one that the caller named.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self._url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            trust_env=False,
        )

    async def post(self, path: str, body: Any) -> Any:
        """The JSON answer to a JSON body. Raises NetError for anything but a success."""
        return await self._json("POST", path, body)

    async def post_text(self, path: str, body: Any) -> str:
        """The answer to a JSON body as text. Raises NetError for anything but a success."""
        try:
            answer = await self._client.post(self._url + path, json=body)
        except httpx.HTTPError as error:
            raise self._failed(path, error) from None
        if answer.status_code >= 400:
            raise self._refused(path, answer.status_code, answer.text)
        return answer.text

    async def get(self, path: str) -> Any:
        """The JSON answer. Raises NetError for anything but a success."""
        return await self._json("GET", path, None)

    async def events(self, path: str, body: Any) -> AsyncIterator[str]:
        """The data of each event of the answer to a JSON body, as text. Raises NetError."""
        try:
            async with self._client.stream("POST", self._url + path, json=body) as answer:
                if answer.status_code >= 400:
                    raise self._refused(
                        path, answer.status_code, (await answer.aread()).decode(errors="replace")
                    )
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        yield line[5:].strip()
        except httpx.HTTPError as error:
            raise self._failed(path, error) from None

    async def close(self) -> None:
        await self._client.aclose()

    async def _json(self, method: str, path: str, body: Any) -> Any:
        try:
            answer = await self._client.request(method, self._url + path, json=body)
            if answer.status_code >= 400:
                raise self._refused(path, answer.status_code, answer.text)
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise self._failed(path, error) from None

    def _refused(self, path: str, status: int, text: str) -> NetError:
        return NetError(f"{shown(self._url + path)}: HTTP {status}: {text[:500]}", status=status)

    def _failed(self, path: str, error: Exception) -> NetError:
        return NetError(f"{shown(self._url + path)}: {type(error).__name__}: {error}".rstrip(": "))
