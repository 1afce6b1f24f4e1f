"""Everything around the API that keeps an endpoint safe and seen.

A request passes, from the outside in: observed (request id, record, log, metrics, traces), CORS, drain,
headers, key, limits, metrics route, body, time. Each is an ASGI application around the next, none of them
reads or buffers an answer, and each lets go of what it holds when the client leaves.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.core.errors import UserError
from tunesmith.serve.access import METRICS_PATH, OPEN_PATHS, Keyed
from tunesmith.serve.access_log import AccessLog, answer_text
from tunesmith.serve.bodies import KEPT_TEXT, BoundedBody, BoundedHeaders, BoundedTime, Bounds
from tunesmith.serve.cors import CAREFUL, Cors, check_origin
from tunesmith.serve.engine import EngineStatus
from tunesmith.serve.errors import ApiError
from tunesmith.serve.keys import Keyring
from tunesmith.serve.limits import Limited, Limiter
from tunesmith.serve.metrics import Metrics, MetricsRoute
from tunesmith.serve.quota import TokenUsage
from tunesmith.serve.record import SCOPE_KEY, RequestRecord
from tunesmith.serve.refuse import header, refuse, route_path
from tunesmith.serve.tracing import open_traces

Observer = Callable[[RequestRecord], None]

KNOWN_PATHS = OPEN_PATHS | {
    METRICS_PATH, "/tokenize", "/detokenize", "/v1/models", "/v1/completions", "/v1/chat/completions",
    "/v1/embeddings", "/v1/responses",
}  # fmt: skip
"""Labels for requests that were refused before the API had found its route."""


@dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """How an endpoint is guarded; without any option it is open, but for the admin paths.

    keys_file: of `tunesmith keys`. api_key: one key that may do everything. open_paths: paths that need no
    key, beside /health and /ready. metrics_open: /metrics too, for others than this machine. cors_origins:
    pages that may ask; ("*",): all. access_log: "-" for stderr, a file, or None. log_prompts: requests and
    answers too. engines: the state of every engine by name, for the metrics.

    Raises UserError for what cannot be meant.
    """

    keys_file: Path | None = None
    api_key: str | None = None
    open_paths: Sequence[str] = ()
    metrics_open: bool = False
    cors_origins: Sequence[str] = ()
    access_log: Path | str | None = None
    log_prompts: bool = False
    bounds: Bounds = field(default_factory=Bounds)
    engines: Callable[[], Mapping[str, EngineStatus]] = dict

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("the API key is empty", hint="give one, or none at all for an open endpoint")
        if self.log_prompts and self.access_log is None:
            raise UserError("prompts can be logged only into an access log", hint="give --log-requests too")
        for origin in self.cors_origins:
            check_origin(origin)


def guard(app: ASGIApp, options: GuardOptions) -> Guard:
    """`app` behind everything that `options` ask. Raises UserError for files that cannot be used."""
    return Guard(app, options)


class Guard:
    """An ASGI application. It writes what it holds when the server's lifespan ends, or at `close`."""

    def __init__(self, app: ASGIApp, options: GuardOptions) -> None:
        keyring = Keyring(options.keys_file, options.api_key)
        self.limiter = Limiter(TokenUsage(options.keys_file), options.bounds.max_requests)
        self.metrics = Metrics(options.engines, self.limiter)
        self._app, self._drain = app, _Drain()
        self._log = _open_log(options)
        self._traces = open_traces()
        self._closed = False
        observers = [watcher.observe for watcher in (self.metrics, self._log, self._traces) if watcher]
        self._http = self._composed(app, options, keyring, observers)

    def _composed(
        self, app: ASGIApp, options: GuardOptions, keyring: Keyring, observers: Sequence[Observer]
    ) -> ASGIApp:
        """From the inside out."""
        app = BoundedTime(app, options.bounds)
        app = BoundedBody(app, options.bounds, keep_text=options.log_prompts)
        app = MetricsRoute(app, self.metrics)
        app = Limited(app, self.limiter)
        app = Keyed(
            app,
            keyring,
            open_paths=options.open_paths,
            metrics_open=options.metrics_open,
            origins=options.cors_origins,
        )
        app = BoundedHeaders(app, options.bounds)
        app = Draining(app, self._drain)
        app = Cors(app, options.cors_origins)
        return Observed(app, observers, keep_text=options.log_prompts)

    @property
    def num_running(self) -> int:
        """Requests under way, other than looks at some state."""
        return self.limiter.running

    def drain(self, retry_after_s: int = 10) -> None:
        """From now on refuse new requests with 503; those under way go on. From any thread."""
        self._drain.retry_after_s = retry_after_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, self._closing(send))
        else:
            # The API has no websockets; nothing may pass that no key was asked for.
            await send({"type": "websocket.close", "code": 1008})

    def _closing(self, send: Send) -> Send:
        async def close_before_the_end(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown"):
                self.close()
            await send(message)

        return close_before_the_end

    def close(self) -> None:
        """Write tokens used, log lines and spans that wait. May be called more than once."""
        if self._closed:
            return
        self._closed = True
        self.limiter.usage.flush()
        for watcher in (self._log, self._traces):
            if watcher is not None:
                watcher.close()


def _open_log(options: GuardOptions) -> AccessLog | None:
    if options.access_log is None:
        return None
    file = None if options.access_log == "-" else Path(options.access_log).expanduser()
    try:
        return AccessLog(file, texts=options.log_prompts)
    except OSError as error:
        hint = "give a file that this user can write, or '-' for stderr"
        raise UserError(f"--log-requests {file}: {error.strerror}", hint=hint) from None


@dataclass
class _Drain:
    retry_after_s: int | None = None


class Draining:
    """Refuses requests while the server ends; its state can still be asked for."""

    def __init__(self, app: ASGIApp, state: _Drain) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._state.retry_after_s is None or route_path(scope) in OPEN_PATHS | {METRICS_PATH}:
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "the server is shutting down",
            status=503,
            code="server_draining",
            retry_after_s=self._state.retry_after_s,
        )
        await refuse(scope, receive, send, error, close=True)


class Observed:
    """Gives every request its record and id, and shows the record to the observers when it has ended."""

    def __init__(self, app: ASGIApp, observers: Sequence[Observer], *, keep_text: bool = False) -> None:
        self._app, self._observers, self._keep_text = app, observers, keep_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = scope[SCOPE_KEY] = _new_record(scope)
        watch = _Watch(record, receive, send, keep_text=self._keep_text)
        try:
            await self._app(scope, watch.receive, watch.send)
        except Exception:
            if not watch.started:
                record.status = 500
            raise
        finally:
            record.duration_s = time.monotonic() - record.started
            record.route = _route(scope)
            if self._keep_text and watch.text:
                record.answer_text = answer_text(bytes(watch.text))
            for observe in self._observers:
                observe(record)


class _Watch:
    """What goes by of a request: its status, whether the client left, and the answer's text if asked."""

    def __init__(self, record: RequestRecord, receive: Receive, send: Send, *, keep_text: bool) -> None:
        self._record, self._receive, self._send, self._keep_text = record, receive, send, keep_text
        self.started = self._ended = False
        self.text = bytearray()

    async def receive(self) -> Message:
        message = await self._receive()
        # The server says so too when it has sent the whole answer.
        if message["type"] == "http.disconnect" and not self._ended:
            self._record.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self._record.status = True, message["status"]
            message["headers"] = _with_own(message.get("headers", []), self._record.request_id)
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
            if self._keep_text:
                self.text += message.get("body", b"")[: KEPT_TEXT - len(self.text)]
        await self._send(message)


def _with_own(headers: Sequence[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    there = {name.lower() for name, _ in headers}
    own = [(b"x-request-id", request_id.encode()), *CAREFUL]
    return [*headers, *((name, value) for name, value in own if name not in there)]


def _new_record(scope: Scope) -> RequestRecord:
    client = scope.get("client")
    trace = header(scope, b"traceparent")
    return RequestRecord(
        request_id=_request_id(header(scope, b"x-request-id")),
        method=scope["method"],
        path=scope["path"],
        client=None if client is None else client[0],
        trace_parent=None if trace is None else trace.decode("latin-1"),
    )


def _request_id(given: bytes | None) -> str:
    """The client's, when it is short and printable; else one of ours."""
    if given is not None and re.fullmatch(rb"[\x21-\x7e]{1,128}", given):
        return given.decode()
    return f"req-{secrets.token_hex(16)}"


def _route(scope: Scope) -> str:
    """The path as the API declares it. Clients can ask for any path: "other" stands for those it has not."""
    declared = getattr(scope.get("route"), "path", None)
    if isinstance(declared, str):
        return declared
    return path if (path := route_path(scope)) in KNOWN_PATHS else "other"
