"""The gateway: an OpenAI-compatible HTTP API over an engine."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith import __version__
from tunesmith.serve import sse
from tunesmith.serve.engine import AnswerStream, Engine
from tunesmith.serve.errors import ApiError, as_api_error, install_handlers
from tunesmith.serve.jobs import Job, ServedModel, chat_job, check_model, completion_job, tokenize
from tunesmith.serve.schema import ChatRequest, CompletionRequest, Sampled, TokenizeRequest
from tunesmith.serve.shapes import ChatShape, CompletionShape, Shape
from tunesmith.serve.text import Piece

OPEN_PATHS = frozenset({"/health", "/ready"})
CLIENT_CLOSED = 499


@dataclass
class Gateway:
    """What the API serves. Both are None while the model is loading."""

    engine: Engine | None = None
    model: ServedModel | None = None

    def get(self) -> tuple[Engine, ServedModel]:
        if self.engine is None or self.model is None:
            raise ApiError("the model is still loading", status=503, code="model_loading")
        return self.engine, self.model


def create_app(gateway: Gateway, *, api_key: str | None = None) -> ASGIApp:
    """The application. `api_key`: what clients must send as a bearer token; None: no key is asked for."""
    app = FastAPI(title="Tunesmith", version=__version__, description="OpenAI-compatible API")
    install_handlers(app)
    _add_status_routes(app, gateway)
    _add_model_routes(app, gateway)
    _add_answer_routes(app, gateway)
    return RequireKey(app, api_key) if api_key else app


class RequireKey:
    """Lets a request pass when it carries the key, or asks only for the server's state."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._wanted = app, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_right(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "a correct API key is needed: 'Authorization: Bearer KEY'", status=401, code="invalid_api_key"
        )
        await error.response(scope, receive, send)

    def _is_right(self, scope: Scope) -> bool:
        given: bytes = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._wanted)


def _add_status_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the process can do its work or is loading the model."""
        status = gateway.engine.status() if gateway.engine else None
        if status is not None and not status.alive:
            return JSONResponse({"status": "failed", "reason": status.failure}, 500)
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """200 when the model has been loaded and has generated a token."""
        if gateway.engine is None or gateway.model is None:
            return JSONResponse({"status": "loading"}, 503)
        status = gateway.engine.status()
        text = "ready" if status.ready else ("not ready" if status.alive else "failed")
        body = {"status": text, "model": gateway.model.name} | asdict(status)
        return JSONResponse(body, 200 if status.ready else 503)


def _add_model_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [gateway.get()[1].card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        served = gateway.get()[1]
        check_model(name, served)
        return JSONResponse(served.card())

    @app.post("/tokenize")
    async def tokenize_route(body: TokenizeRequest) -> Response:
        """The token ids that an endpoint would feed the model."""
        served = gateway.get()[1]
        tokens = tokenize(body, served)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": served.max_length})


def _add_answer_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        engine, served = gateway.get()
        job = completion_job(body, served)
        return await _answer(
            body, job, engine, CompletionShape(served, logprobs=body.logprobs is not None), request
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        engine, served = gateway.get()
        job = chat_job(body, served)
        return await _answer(body, job, engine, ChatShape(served, logprobs=bool(body.logprobs)), request)


async def _answer(body: Sampled, job: Job, engine: Engine, shape: Shape, request: Request) -> Response:
    stream = engine.submit(job.requests)
    if body.stream:
        return sse.EventStream(_chunks(job, stream, shape, usage=body.include_usage), stream.cancel)
    try:
        async with sse.when_disconnected(request.receive, stream.cancel):
            wholes = await _collect(job, stream)
    finally:
        stream.cancel()
    if any(piece.finish_reason is None for piece in wholes):
        return Response(status_code=CLIENT_CLOSED)
    choices = [shape.whole(index, piece) for index, piece in enumerate(wholes)]
    return JSONResponse(shape.envelope(choices, chunk=False) | {"usage": job.usage()})


async def _collect(job: Job, stream: AnswerStream) -> list[Piece]:
    """Every choice whole; without a finish_reason where the client left before."""
    wholes = [Piece() for _ in job.answers]
    async for batch in _pieces(job, stream):
        for index, piece in batch:
            wholes[index].text += piece.text
            wholes[index].tokens += piece.tokens
            wholes[index].finish_reason = piece.finish_reason
    return wholes


async def _chunks(job: Job, stream: AnswerStream, shape: Shape, *, usage: bool) -> AsyncIterator[bytes]:
    """The events of a streamed response."""
    extra: dict[str, Any] = {"usage": None} if usage else {}
    opened: set[int] = set()
    try:
        async for batch in _pieces(job, stream):
            events = []
            for index, piece in batch:
                if index not in opened and (first := shape.first(index)) is not None:
                    events.append(first)
                opened.add(index)
                if piece.text or piece.tokens or piece.finish_reason:
                    events.append(shape.part(index, piece))
            if events:
                yield b"".join(sse.encode(shape.envelope([e], chunk=True) | extra) for e in events)
    except Exception as error:
        yield sse.encode(as_api_error(error).body)
        return
    if usage:
        yield sse.encode(shape.envelope([], chunk=True) | {"usage": job.usage()})
    yield sse.DONE


async def _pieces(job: Job, stream: AnswerStream) -> AsyncIterator[list[tuple[int, Piece]]]:
    """Final text of the choices as it comes; a choice that met a stop string is ended."""
    async for batch in stream:
        pieces = []
        for index, event in batch:
            answer = job.answers[index]
            if answer.finish_reason is not None:
                continue
            piece = answer.push(event)
            if piece.finish_reason == "error":
                raise ApiError("the model's logits are not finite", status=500, code="not_finite")
            if piece.finish_reason is not None and event.finish_reason is None:
                stream.cancel(index)
            pieces.append((index, piece))
        yield pieces
