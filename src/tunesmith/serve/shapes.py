"""The two shapes of an answer: completions and chat, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from tunesmith.serve.jobs import ServedModel
from tunesmith.serve.text import Detokenizer, Piece, Token

Json = dict[str, Any]


class Shape(Protocol):
    """Builds the objects of one response."""

    def first(self, index: int) -> Json | None:
        """The choice that opens a stream, where the shape has one."""
        ...

    def part(self, index: int, piece: Piece) -> Json:
        """A choice in a chunk."""
        ...

    def whole(self, index: int, piece: Piece) -> Json:
        """A choice in a response that is not streamed."""
        ...

    def envelope(self, choices: list[Json], *, chunk: bool) -> Json: ...


class CompletionShape:
    def __init__(self, model: ServedModel, *, logprobs: bool) -> None:
        self._model, self._logprobs = model, logprobs
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
        }

    def first(self, index: int) -> Json | None:
        return None

    def part(self, index: int, piece: Piece) -> Json:
        logprobs = completion_logprobs(piece.tokens, self._model.detokenizer) if self._logprobs else None
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    whole = part

    def envelope(self, choices: list[Json], *, chunk: bool) -> Json:
        return self._head | {"model": self._model.name, "choices": choices}


class ChatShape:
    def __init__(self, model: ServedModel, *, logprobs: bool) -> None:
        self._model, self._logprobs = model, logprobs
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}"}
        self._created = int(time.time())

    def first(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> Json:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta} | self._rest(piece)

    def whole(self, index: int, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message} | self._rest(piece)

    def envelope(self, choices: list[Json], *, chunk: bool) -> Json:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        rest = {"object": kind, "created": self._created, "model": self._model.name, "choices": choices}
        return self._head | rest

    def _rest(self, piece: Piece) -> Json:
        logprobs = None
        if self._logprobs:
            logprobs = {"content": chat_logprobs(piece.tokens, self._model.detokenizer), "refusal": None}
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason}


def completion_logprobs(tokens: Sequence[Token], detokenizer: Detokenizer) -> Json:
    """The chosen token is always among `top_logprobs`; a prompt's first token has none."""
    top: list[Json | None] = []
    for token in tokens:
        found = token.logprobs
        if found is None:
            top.append(None)
            continue
        entries = {detokenizer.piece(token_id)[0]: value for token_id, value in reversed(found.top)}
        top.append(dict(reversed(entries.items())) | {detokenizer.piece(found.token_id)[0]: found.logprob})
    return {
        "tokens": [detokenizer.piece(token.token_id)[0] for token in tokens],
        "token_logprobs": [token.logprobs.logprob if token.logprobs else None for token in tokens],
        "top_logprobs": top,
        "text_offset": [token.offset for token in tokens],
    }


def chat_logprobs(tokens: Sequence[Token], detokenizer: Detokenizer) -> list[Json]:
    def entry(token_id: int, logprob: float) -> Json:
        text, data = detokenizer.piece(token_id)
        return {"token": text, "logprob": logprob, "bytes": data}

    return [
        entry(token.token_id, token.logprobs.logprob)
        | {"top_logprobs": [entry(token_id, value) for token_id, value in token.logprobs.top]}
        for token in tokens
        if token.logprobs is not None
    ]
