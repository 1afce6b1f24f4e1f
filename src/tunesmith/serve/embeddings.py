"""Vectors of texts from a causal model, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from tunesmith.serve.engine import Engine
from tunesmith.serve.errors import ApiError
from tunesmith.serve.jobs import ServedModel, encode_texts
from tunesmith.serve.record import CLIENT_CLOSED, record_of
from tunesmith.serve.schema import EmbeddingRequest
from tunesmith.serve.sse import when_disconnected

POOLING = "mean of the final hidden states of a causal language model, scaled to length 1"
"""What the vectors are: no model here was trained to embed."""
AT_ONCE = 16
"""Prompts that the engine is given together: so many are computed for a client who has gone."""


async def embed(body: EmbeddingRequest, model: ServedModel, engine: Engine, request: Request) -> Response:
    """The whole answer. Raises ApiError, UserError and EngineError."""
    prompts = await asyncio.to_thread(_prompts, body, model)
    record_of(request.scope).prompted(sum(len(prompt) for prompt in prompts))
    vectors: list[list[float]] = []
    gone = asyncio.Event()
    async with when_disconnected(request.receive, gone.set):
        for at in range(0, len(prompts), AT_ONCE):
            if gone.is_set():
                return Response(status_code=CLIENT_CLOSED)
            vectors += await engine.embed(prompts[at : at + AT_ONCE], model.adapter)
    return JSONResponse(_answer(body, model, vectors, sum(len(prompt) for prompt in prompts)))


def _answer(
    body: EmbeddingRequest, model: ServedModel, vectors: list[list[float]], tokens: int
) -> dict[str, Any]:
    """tokens: of all prompts."""
    if body.dimensions is not None:
        vectors = [shortened(vector, body.dimensions) for vector in vectors]
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model.name, "pooling": POOLING, "usage": usage}


def _prompts(body: EmbeddingRequest, model: ServedModel) -> list[list[int]]:
    _, prompts = encode_texts(body.input, model, param="input")
    for number, prompt in enumerate(prompts):
        if len(prompt) > model.max_length:
            raise ApiError(
                f"input[{number}]: has {len(prompt)} tokens; this model's maximum context length is "
                f"{model.max_length}",
                param="input",
                code="context_length_exceeded",
            )
    return prompts


def shortened(vector: Sequence[float], dimensions: int) -> list[float]:
    """The first `dimensions` numbers, scaled to length 1. Raises ApiError when there are fewer."""
    if dimensions > len(vector):
        raise ApiError(
            f"dimensions: {dimensions} is more than the {len(vector)} that the model has", param="dimensions"
        )
    first = vector[:dimensions]
    length = math.sqrt(sum(number * number for number in first))
    return [number / length for number in first] if length else list(first)


def _written(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    """Numbers, or the base64 of their bytes as little-endian float32, which OpenAI's clients ask for."""
    if encoding != "base64":
        return list(vector)
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")
