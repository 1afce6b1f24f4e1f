"""A client that speaks raw ASGI, and a small application that answers as the API does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tunesmith.serve.handlers import install_handlers
from tunesmith.serve.record import record_of
from tunesmith.serve.sse import DONE, EventStream, encode

LOCAL, REMOTE = ("127.0.0.1", 40_000), ("192.0.2.7", 40_000)
ASK = b'{"model": "tiny", "tokens": 3}'


@dataclass
class Reply:
    """What came back; status 0: nothing."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False
    began: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]

    async def take(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            assert not self.ended, "an answer goes on after its end"
            self.body += message.get("body", b"")
            self.ended = not message.get("more_body", False)
            self.began.set()


class Client:
    """One request. `leave()` is the client's going away, at any moment."""

    def __init__(
        self,
        path: str = "/v1/completions",
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        chunks: Iterable[bytes] = (ASK,),
        address: tuple[str, int] | None = LOCAL,
        pause_s: float = 0.0,
        length: bool = True,
    ) -> None:
        self.reply = Reply()
        self._chunks, self._pause_s, self._left = list(chunks), pause_s, asyncio.Event()
        lines = {"host": "localhost:8000"} | dict(headers or {})
        if method == "POST" and length:
            lines.setdefault("content-length", str(sum(map(len, self._chunks))))
        elif method == "POST":
            lines["transfer-encoding"] = "chunked"
        else:
            self._chunks = [b""]
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in lines.items()],
            "client": address,
            "server": ("127.0.0.1", 8000),
        }

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> Any:
        if self._left.is_set() or not self._chunks:
            await self._left.wait()
            return {"type": "http.disconnect"}
        await asyncio.sleep(self._pause_s)
        body = self._chunks.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(self._chunks)}

    async def run(self, app: Any) -> Reply:
        await app(self.scope, self._receive, self.reply.take)
        return self.reply


def ask(app: Any, path: str = "/v1/completions", **options: Any) -> Reply:
    async def once() -> Reply:
        return await Client(path, **options).run(app)

    return asyncio.run(once())


def get(app: Any, path: str, **options: Any) -> Reply:
    return ask(app, path, method="GET", **options)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Words:
    """Answers `tokens` words; a stream gives one each time `step` is released. `open`: streams that run."""

    def __init__(self) -> None:
        self.step = asyncio.Semaphore(0)
        self.open = 0
        self.app = FastAPI()
        install_handlers(self.app)
        self.app.add_api_route("/health", self.health)
        self.app.add_api_route("/v1/models/{name:path}", self.model)
        self.app.add_api_route("/admin/adapters", self.health, methods=["GET", "POST"])
        self.app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        self.app.add_api_route("/hang", self.hang, methods=["POST"])
        self.app.add_api_route("/fail", self.fail, methods=["POST"])

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def model(self, name: str) -> Response:
        return JSONResponse({"id": name})

    async def completions(self, request: Request) -> Response:
        asked = await request.json()
        record = record_of(request.scope)
        record.use(asked["model"], adapter=asked.get("adapter"))
        record.prompted(5)
        record.cached_tokens = 2
        if asked.get("stream"):
            return EventStream(
                self._events(request, asked["tokens"], asked.get("word", "word ")), lambda: None
            )
        record.emitted(asked["tokens"])
        record.finish = "stop"
        return JSONResponse({"choices": [{"index": 0, "text": "word " * asked["tokens"]}]})

    async def _events(self, request: Request, tokens: int, word: str) -> AsyncIterator[bytes]:
        record = record_of(request.scope)
        self.open += 1
        try:
            for _ in range(tokens):
                await self.step.acquire()
                record.emitted(1)
                yield encode({"choices": [{"index": 0, "text": word}]})
            record.finish = "stop"
            yield DONE
        finally:
            self.open -= 1

    async def hang(self) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def fail(self) -> Response:
        raise RuntimeError("a bug")
