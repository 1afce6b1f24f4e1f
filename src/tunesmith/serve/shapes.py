"""The two shapes of an answer: completions and chat, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from tunesmith.serve import sse
from tunesmith.serve.errors import ApiError
from tunesmith.serve.jobs import Job, ServedModel
from tunesmith.serve.text import Detokenizer, Piece, Token
from tunesmith.serve.tool_calls import CallDelta, whole_calls

Json = dict[str, Any]


class Shape(Protocol):
    """Builds one response: either `whole`, or `begin`, then `feed` for every piece, then `end` or `fail`."""

    def whole(self, pieces: Sequence[Piece], job: Job) -> Json: ...

    def begin(self) -> bytes:
        """The events that open a stream, before anything is known of the answer."""
        ...

    def feed(self, index: int, piece: Piece) -> bytes:
        """The events of what choice `index` says next; empty where there is nothing to tell."""
        ...

    def end(self, job: Job) -> bytes: ...

    def fail(self, error: ApiError) -> bytes: ...


class ChunkShape(ABC):
    """What completions and chat share: choices in an envelope, and `[DONE]` at a stream's end.

    usage: whether a stream ends with a chunk of the usage.
    """

    def __init__(self, model: ServedModel, *, prefix: str, logprobs: bool, usage: bool) -> None:
        self._model, self._logprobs = model, logprobs
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }
        self._usage = usage
        self._extra: Json = {"usage": None} if usage else {}

    kinds: tuple[str, str]
    """The names of the whole object and of a chunk."""

    @abstractmethod
    def choice(self, index: int, piece: Piece) -> Json:
        """A whole choice."""

    @abstractmethod
    def parts(self, index: int, piece: Piece) -> list[Json]:
        """A choice in chunks, one after the other."""

    def whole(self, pieces: Sequence[Piece], job: Job) -> Json:
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        return self._head | {"object": self.kinds[0], "choices": choices, "usage": job.usage()}

    def begin(self) -> bytes:
        return b""

    def feed(self, index: int, piece: Piece) -> bytes:
        return b"".join(self._chunk([part]) for part in self.parts(index, piece))

    def end(self, job: Job) -> bytes:
        last = self._chunk([], usage=job.usage()) if self._usage else b""
        return last + sse.DONE

    def fail(self, error: ApiError) -> bytes:
        return sse.encode(error.body)

    def _chunk(self, choices: list[Json], **extra: Any) -> bytes:
        chunk = {"object": self.kinds[1], "choices": choices}
        return sse.encode(self._head | chunk | self._extra | extra)


class CompletionShape(ChunkShape):
    kinds = ("text_completion", "text_completion")

    def __init__(self, model: ServedModel, *, logprobs: bool, usage: bool = False) -> None:
        super().__init__(model, prefix="cmpl", logprobs=logprobs, usage=usage)

    def parts(self, index: int, piece: Piece) -> list[Json]:
        return [self.choice(index, piece)] if piece else []

    def choice(self, index: int, piece: Piece) -> Json:
        logprobs = completion_logprobs(piece.tokens, self._model.detokenizer) if self._logprobs else None
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }


class ChatShape(ChunkShape):
    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, model: ServedModel, *, logprobs: bool, usage: bool = False) -> None:
        super().__init__(model, prefix="chatcmpl", logprobs=logprobs, usage=usage)
        self._opened: set[int] = set()

    def parts(self, index: int, piece: Piece) -> list[Json]:
        """A stream opens with the role; content and each call's part come in chunks of their own."""
        first: list[Json] = []
        if index not in self._opened:
            self._opened.add(index)
            first = [self._part(index, {"role": "assistant", "content": ""}, Piece())]
        deltas: list[Json] = [{"tool_calls": [call_delta(call)]} for call in piece.calls]
        if piece.text:
            deltas.insert(0, {"content": piece.text})
        if not deltas:
            return first + ([self._part(index, {}, piece)] if piece else [])
        ends = [Piece()] * (len(deltas) - 1) + [piece]
        return first + [self._part(index, delta, end) for delta, end in zip(deltas, ends, strict=True)]

    def choice(self, index: int, piece: Piece) -> Json:
        calls = [call.as_openai() for call in whole_calls(iter(piece.calls))]
        message: Json = {"role": "assistant", "content": piece.text, "refusal": None}
        if calls:
            message |= {"content": piece.text or None, "tool_calls": calls}
        return {"index": index, "message": message} | self._rest(piece)

    def _part(self, index: int, delta: Json, piece: Piece) -> Json:
        return {"index": index, "delta": delta} | self._rest(piece)

    def _rest(self, piece: Piece) -> Json:
        logprobs = None
        if self._logprobs:
            logprobs = {"content": chat_logprobs(piece.tokens, self._model.detokenizer), "refusal": None}
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason}


def call_delta(call: CallDelta) -> Json:
    """A part of a tool call: the first has its id and name, all have some of its arguments."""
    function: Json = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    head = {"index": call.index, "id": call.id, "type": "function"}
    return head | {"function": {"name": call.name} | function}


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
