"""Requests of the Responses API, told as chat requests: one way to prompts and parameters for both."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from tunesmith.serve.errors import ApiError, shown
from tunesmith.serve.schema import (
    MAX_TOKENS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    AllowedChoice,
    Body,
    ChatRequest,
    FunctionName,
    JsonObjectFormat,
    JsonSchema,
    JsonSchemaFormat,
    ManyAllowed,
    Metadata,
    NamedChoice,
    NamedFunction,
    ResponseFormat,
    TextFormat,
    ToolFunction,
)

LOGPROBS = "message.output_text.logprobs"


class FunctionTool(ToolFunction):
    type: Literal["function"]


class NamedTool(Body):
    type: Literal["function"]
    name: FunctionName


class AllowedTools(ManyAllowed):
    type: Literal["allowed_tools"]


class SchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class Obfuscation(Body):
    include_obfuscation: bool | None = None


Item = dict[str, Any]
Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class ResponsesRequest(Body):
    """A question and its answer; this server keeps neither, so every request brings its whole history."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: Obfuscation | None = None
    include: Annotated[list[Included], Field(max_length=8, fail_fast=True)] | None = None
    truncation: Literal["disabled"] | None = Field(None, description="Nothing is ever cut off silently.")
    # Accepted and without effect on the answer.
    user: str | None = None
    metadata: Metadata | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # What would need a memory, or models, that this server does not have.
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_tool_calls: int | None = None

    @property
    def logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def has_grammar(self) -> bool:
        return bool(self.text or self.tools)


_STATE = "this server keeps no answers: send the whole conversation as input"
_REFUSED = {
    "store": f"{_STATE}, and store: false",
    "previous_response_id": _STATE,
    "conversation": _STATE,
    "background": "an answer is computed while its client waits",
    "prompt": "there are no stored prompts: give input and instructions",
    "reasoning": "the models here have no settings for reasoning",
    "max_tool_calls": "there are no built-in tools",
}


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same question as a chat request. Raises ApiError for what cannot be said so."""
    _refuse(body)
    tools = [_chat_tool(tool) for tool in body.tools or ()]
    return ChatRequest(
        model=body.model,
        messages=_messages(body),
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=body.logprobs or None,
        top_logprobs=body.top_logprobs if body.logprobs else None,
        tools=tools or None,
        tool_choice=_chat_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_chat_format(body.text),
        stream=body.stream,
    )


PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""What the fields of the chat request are called here, for errors."""


def _refuse(body: ResponsesRequest) -> None:
    for param, why in _REFUSED.items():
        value = getattr(body, param)
        if isinstance(value, dict):
            value = {key: each for key, each in value.items() if each is not None}
        if value:
            raise ApiError(f"'{param}' is not supported: {why}", param=param, code="unsupported_parameter")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(f"top_logprobs: needs include: ['{LOGPROBS}']", param="top_logprobs")


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": _given(tool) | {"name": tool.name}}


def _given(model: BaseModel) -> dict[str, Any]:
    """The fields that were given, but the type."""
    return model.model_dump(exclude_unset=True, exclude={"type"}, by_alias=True)


def _chat_choice(choice: Any) -> Any:
    if isinstance(choice, NamedTool):
        return NamedChoice(type="function", function=NamedFunction(name=choice.name))
    if isinstance(choice, AllowedTools):
        allowed = ManyAllowed(mode=choice.mode, tools=choice.tools)
        return AllowedChoice(type="allowed_tools", allowed_tools=allowed)
    return choice


def _chat_format(text: TextOptions | None) -> ResponseFormat | None:
    chosen = text.format if text else None
    if not isinstance(chosen, SchemaFormat):
        return chosen
    return JsonSchemaFormat(type="json_schema", json_schema=JsonSchema.model_validate(_given(chosen)))


# -- input items -------------------------------------------------------------------------------------


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    head = [{"role": "system", "content": body.instructions}] if body.instructions is not None else []
    if isinstance(body.input, str):
        return [*head, {"role": "user", "content": body.input}]
    messages: list[dict[str, Any]] = head
    for number, item in enumerate(body.input):
        _add(messages, item, f"input[{number}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Item, place: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _content(item.get("content"), place)})
    elif kind == "function_call":
        _add_call(messages, item, place)
    elif kind == "function_call_output":
        output = _content(item.get("output"), f"{place}.output")
        messages.append({"role": "tool", "content": output, "tool_call_id": _text_of(item, "call_id", place)})
    else:
        raise _unsupported(f"{place}.type: {shown(kind)}")


def _add_call(messages: list[dict[str, Any]], item: Item, place: str) -> None:
    """A call belongs to the assistant's message before it, if there is one."""
    function = {"name": _text_of(item, "name", place), "arguments": _text_of(item, "arguments", place)}
    call = {"id": _text_of(item, "call_id", place), "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _content(content: Any, place: str) -> Any:
    """Text as it is; parts as the chat API calls them."""
    if not isinstance(content, list):
        return content
    return [_part(part, f"{place}[{number}]") for number, part in enumerate(content)]


def _part(part: Any, place: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("input_text", "output_text", "text"):
        raise _unsupported(f"{place}: {shown(part)}")
    return {"type": "text", "text": part.get("text")}


def _text_of(item: Item, key: str, place: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise ApiError(f"{place}.{key}: {shown(value)} is not a string", param=f"{place}.{key}")
    return value


def _unsupported(what: str) -> ApiError:
    return ApiError(
        f"{what} is not supported: messages of text, function_call and function_call_output are",
        param="input",
        code="unsupported_parameter",
    )
