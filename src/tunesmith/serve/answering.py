"""From a job to its response: every choice whole, or events as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from tunesmith.serve import sse
from tunesmith.serve.engine import AnswerStream, Ask, Engine
from tunesmith.serve.errors import ApiError, as_api_error
from tunesmith.serve.jobs import Job
from tunesmith.serve.record import CLIENT_CLOSED, RequestRecord, record_of
from tunesmith.serve.shapes import Shape
from tunesmith.serve.text import Piece


async def answer(job: Job, engine: Engine, shape: Shape, request: Request, *, stream: bool) -> Response:
    """Ask the engine, and answer in this shape. Raises ApiError, UserError and EngineError at once."""
    record = record_of(request.scope)
    answers = engine.submit(job.asks)
    record.prompted(job.prompt_tokens)
    if stream:
        return sse.EventStream(_events(job, answers, shape, record), answers.cancel)
    try:
        async with sse.when_disconnected(request.receive, answers.cancel):
            wholes = await _collect(job, answers, record)
    finally:
        answers.cancel()
    if any(piece.finish_reason is None for piece in wholes):
        return Response(status_code=CLIENT_CLOSED)
    return JSONResponse(shape.whole(job.best(wholes), job))


async def _collect(job: Job, stream: AnswerStream, record: RequestRecord) -> list[Piece]:
    """Every choice whole; without a finish_reason where the client left before."""
    wholes = [Piece() for _ in job.answers]
    async for batch in _pieces(job, stream, record):
        for index, piece in batch:
            wholes[index].add(piece)
    return wholes


async def _events(
    job: Job, stream: AnswerStream, shape: Shape, record: RequestRecord
) -> AsyncIterator[bytes]:
    """The events of a streamed response; a failure is the last of them."""
    try:
        if opening := shape.begin():
            yield opening
        async for batch in _pieces(job, stream, record):
            if data := b"".join(shape.feed(index, piece) for index, piece in batch):
                yield data
        yield shape.end(job)
    except Exception as error:
        told = as_api_error(error)
        record.error = told.code
        yield shape.fail(told)


async def _pieces(
    job: Job, stream: AnswerStream, record: RequestRecord
) -> AsyncIterator[list[tuple[int, Piece]]]:
    """Final text of the choices as it comes; a choice that met a stop string is ended."""
    async for batch in stream:
        record.emitted(sum(event.token_id is not None for _, event in batch))
        pieces = []
        for index, event in batch:
            choice = job.answers[index]
            if choice.finish_reason is not None:
                continue
            piece = choice.push(event)
            if event.cached_tokens:
                record.cached_tokens = job.cached_tokens
            if piece.finish_reason == "error":
                raise _broken(job.asks[index])
            if piece.finish_reason is not None and event.finish_reason is None:
                stream.cancel(index)
            record.finish = piece.finish_reason or record.finish
            pieces.append((index, piece))
        yield pieces


def _broken(ask: Ask) -> ApiError:
    """Why an answer could not go on."""
    if ask.params.grammar is None:
        return ApiError("the model's logits are not finite", status=500, code="not_finite")
    return ApiError(
        "the answer could not be continued within its grammar: it is too large, or no token of the model "
        "fits it. Hint: give a simpler schema",
        code="grammar_failed",
    )
