"""The gateway: an OpenAI-compatible HTTP API over an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tunesmith import __version__
from tunesmith.serve.admin import admin_router
from tunesmith.serve.answering import answer
from tunesmith.serve.embeddings import embed
from tunesmith.serve.gateway import Gateway, OpenAdapter, OpenedAdapter
from tunesmith.serve.handlers import install_handlers
from tunesmith.serve.jobs import ServedModel, chat_job, completion_job, detokenize, tokenize
from tunesmith.serve.json_body import JsonRoute
from tunesmith.serve.record import record_of
from tunesmith.serve.replies import (
    ERRORS,
    ChatReply,
    CompletionReply,
    DetokenizeReply,
    EmbeddingReply,
    HealthReply,
    ModelCard,
    ModelList,
    ReadyReply,
    ResponseReply,
    TokenizeReply,
    json_reply,
)
from tunesmith.serve.responses import ResponseShape, response_job
from tunesmith.serve.responses_input import ResponsesRequest
from tunesmith.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from tunesmith.serve.shapes import ChatShape, CompletionShape

__all__ = ["Gateway", "OpenAdapter", "OpenedAdapter", "create_app"]

LONG_BODY = 32_768
"""Bytes of a request above which its prompt is made in another thread: others do not wait for it."""
B = TypeVar("B")
T = TypeVar("T")


def create_app(gateway: Gateway) -> FastAPI:
    """The application, open to everybody who reaches it: `guard` stands before it."""
    app = FastAPI(
        title="Tunesmith",
        version=__version__,
        description="OpenAI-compatible API",
        redirect_slashes=False,
    )
    install_handlers(app)
    for router in (_status_router(gateway), _model_router(gateway), _answer_router(gateway)):
        app.include_router(router)
    app.include_router(admin_router(gateway))
    return app


def _status_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/health", responses=json_reply(HealthReply) | {500: {"model": HealthReply}})
    async def health() -> Response:
        """200 while the process can do its work or is loading the model."""
        status = gateway.engine.status() if gateway.engine else None
        if status is not None and not status.alive:
            return JSONResponse({"status": "failed", "reason": status.failure}, 500)
        return JSONResponse({"status": "ok"})

    @router.get("/ready", responses=json_reply(ReadyReply) | {503: {"model": ReadyReply}})
    async def ready() -> Response:
        """200 when the model has been loaded and has generated a token."""
        if gateway.engine is None or not gateway.models:
            return JSONResponse({"status": "loading"}, 503)
        status = gateway.engine.status()
        text = "ready" if status.ready else ("not ready" if status.alive else "failed")
        body = {"status": text, "model": gateway.default.name} | asdict(status)
        return JSONResponse(body, 200 if status.ready else 503)

    return router


def _model_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["models"], responses=ERRORS)

    @router.get("/v1/models", responses=json_reply(ModelList))
    async def models(request: Request) -> Response:
        """The base model and every adapter that the key may use, each with what it is made of."""
        gateway.ready_engine()
        cards = [model.card() for model in gateway.models.values() if _may_use(request, model.name)]
        return JSONResponse({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}", responses=json_reply(ModelCard))
    async def model(name: str, request: Request) -> Response:
        return JSONResponse(_served(gateway, name, request).card())

    @router.post("/tokenize", responses=json_reply(TokenizeReply))
    async def tokenize_route(body: TokenizeRequest, request: Request) -> Response:
        """The token ids that an endpoint would feed the model."""
        return JSONResponse(await _made(tokenize, body, _served(gateway, body.model, request), request))

    @router.post("/detokenize", responses=json_reply(DetokenizeReply))
    async def detokenize_route(body: DetokenizeRequest, request: Request) -> Response:
        """The text of token ids, special tokens included."""
        return JSONResponse(await _made(detokenize, body, _served(gateway, body.model, request), request))

    @router.post("/v1/embeddings", responses=json_reply(EmbeddingReply))
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts, pooled from a model that was trained to continue them."""
        engine, served = gateway.ready_engine(), _served(gateway, body.model, request)
        return await embed(body, served, engine, request)

    return router


def _answer_router(gateway: Gateway) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["answers"], responses=ERRORS)

    @router.post("/v1/completions", responses=json_reply(CompletionReply, streamed=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or several."""
        engine, served = gateway.ready_engine(), _served(gateway, body.model, request)
        job = await _made(completion_job, body, served, request)
        shape = CompletionShape(served, logprobs=body.logprobs is not None, usage=body.include_usage)
        return await answer(job, engine, shape, request, stream=bool(body.stream))

    @router.post("/v1/chat/completions", responses=json_reply(ChatReply, streamed=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, rendered by the model's own template."""
        engine, served = gateway.ready_engine(), _served(gateway, body.model, request)
        job = await _made(chat_job, body, served, request)
        shape = ChatShape(served, logprobs=bool(body.logprobs), usage=body.include_usage)
        return await answer(job, engine, shape, request, stream=bool(body.stream))

    @router.post("/v1/responses", responses=json_reply(ResponseReply, streamed=True))
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, told as items. Nothing is stored."""
        engine, served = gateway.ready_engine(), _served(gateway, body.model, request)
        job = await _made(response_job, body, served, request)
        return await answer(job, engine, ResponseShape(body, served), request, stream=bool(body.stream))

    return router


def _may_use(request: Request, name: str) -> bool:
    return record_of(request.scope).may_use(name)


def _served(gateway: Gateway, name: str | None, request: Request) -> ServedModel:
    """The model that was asked for. Raises ApiError where there is none, or not for this request's key."""
    record = record_of(request.scope)
    served = gateway.find(name, record.may_use)
    record.use(served.name, adapter=served.adapter)
    return served


async def _made(make: Callable[[B, ServedModel], T], body: B, served: ServedModel, request: Request) -> T:
    """`make(body, served)`, which renders, tokenises and compiles, elsewhere when that may take long."""
    if len(await request.body()) > LONG_BODY or getattr(body, "has_grammar", False):
        return await asyncio.to_thread(make, body, served)
    return make(body, served)
