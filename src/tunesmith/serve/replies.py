"""The bodies of answers, for the API's description; what is sent is checked against them by tests.

Answers are built as plain objects: validating every one of them again would cost more than making it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorFields(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    error: ErrorFields


class PromptTokens(Reply):
    """cached_tokens: those that were not computed, because the engine's cache had them."""

    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class InputUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class ModelCard(Reply):
    """`root` and further fields say what the model is made of: run, data, base, template, adapter."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelCard]


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Reply):
    name: str
    arguments: str


class CalledTool(Reply):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] = []


class ChatChoice(Reply):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ResponseReply(Reply):
    """A list of items, and every setting that they were computed with."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class Vector(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingReply(Reply):
    """`pooling` says what the vectors are: no model here was trained to embed."""

    object: Literal["list"]
    data: list[Vector]
    model: str
    pooling: str
    usage: InputUsage


class TokenizeReply(Reply):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class DetokenizeReply(Reply):
    prompt: str


class HealthReply(Reply):
    status: str
    reason: str | None = None


class ReadyReply(Reply):
    """The engine's counters beside its status."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    status: str


class StateReply(Reply):
    engine: dict[str, Any] | None
    models: list[ModelCard]


class DeletedReply(Reply):
    id: str
    object: Literal["model"]
    deleted: Literal[True]


Described = dict[int | str, dict[str, Any]]

_RETRY = {
    "Retry-After": {"description": "Seconds to wait before the next try.", "schema": {"type": "string"}}
}
ERRORS: Described = {
    "4XX": {"model": ErrorReply, "description": "The request is at fault; `error` says where."},
    429: {"model": ErrorReply, "description": "Too many requests.", "headers": _RETRY},
    "5XX": {"model": ErrorReply, "description": "The server is at fault."},
    503: {"model": ErrorReply, "description": "Loading, stopping or failed.", "headers": _RETRY},
}
"""What every route may answer besides its own reply."""


def json_reply(model: type[BaseModel], *, streamed: bool = False) -> Described:
    """A route's own answer; streamed: or events, where the request asks for a stream."""
    content: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}} if streamed else {}
    return {200: {"model": model, "description": "The answer.", "content": content}}
