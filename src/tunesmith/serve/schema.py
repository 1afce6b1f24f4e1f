"""The bodies of requests, as OpenAI defines them, with the few extensions that vLLM made customary.

A field that we do not know is refused, never ignored: it might change the answer. A value of another type
(a number in a string) is refused too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
)

MAX_STOPS = 16
MAX_CHOICES = 64
MAX_PROMPTS = 2048
MAX_TOOLS = 128
MAX_BIASED = 4096
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Stop = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
# fail_fast: a list of a million faults is one fault, not a million error objects.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


def _prompt_kind(value: Any) -> str | None:
    """Which of its forms a prompt means to be: a fault in it is a fault of that form."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if not value or isinstance(value[0], str):
        return "texts"
    return "many_ids" if isinstance(value[0], list) else "ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[ManyTokenIds, Tag("many_ids")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="Input should be text, a list of texts, of token ids, or of lists of token ids",
    ),
]
BiasKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]


def _not_many(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASED:
        raise ValueError(f"{len(value)} entries are more than {MAX_BIASED}")
    return value


Bias = Annotated[
    dict[BiasKey, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASED, json_schema_extra={"additionalProperties": False}),
    BeforeValidator(_not_many),
]
Metadata = Annotated[dict[str, str], Field(max_length=16), BeforeValidator(_not_many)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), populate_by_name=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class StructuredOutputs(Body):
    """Extension: what the answer must look like; exactly one of these."""

    json_: dict[str, Any] | None = Field(None, alias="json", description="A JSON schema.")
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Stop], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = Field(None, description="A Lark grammar.")


class Sampled(Body):
    """What completions and chat share."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2, description="0: greedy; default 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Default 1.")
    top_k: int | None = Field(
        None,
        ge=-1,
        le=MAX_TOKENS,
        description="Extension: likeliest tokens to draw from; 0 or -1, the default: all.",
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Extension: draw only tokens at least this share as likely as the likeliest; default 0.",
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Extension: divides the logits of tokens seen before; default 1.",
    )
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Bias | None = None
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool | None = Field(None, description="Extension: go on after a stop token, for benchmarks.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted and without effect on the answer.
    user: str | None = None
    metadata: Metadata | None = None
    store: bool | None = Field(None, description="Not supported: this server keeps no answers.")
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def has_grammar(self) -> bool:
        """Whether something has to be compiled before it can be answered."""
        return self.structured_outputs is not None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Sampled):
    prompt: Prompt
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="Default 16; 0 only together with echo."
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="Write so many answers to each prompt and give the n likeliest, token for token.",
    )
    suffix: str | None = Field(None, description="Not supported: the models here only continue a text.")


_ROLES = ["system", "developer", "user", "assistant", "tool", "function"]
MESSAGE_SCHEMA = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": _ROLES},
        "content": {
            "anyOf": [
                {"type": "string"},
                {"type": "null"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
            ]
        },
        "tool_calls": {"type": "array", "items": {"type": "object"}},
        "tool_call_id": {"type": "string"},
        "name": {"type": "string"},
    },
}
# Messages are checked by model.messages, the same code that reads training rows.
Message = Annotated[dict[str, Any], WithJsonSchema(MESSAGE_SCHEMA)]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ToolFunction(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


TOOL_SCHEMA = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": ToolFunction.model_json_schema()},
}
# Tools are checked by tool_grammar, and kept as given: the template writes their keys as they came.
Tools = Annotated[
    list[Annotated[dict[str, Any], WithJsonSchema(TOOL_SCHEMA)]],
    Field(max_length=MAX_TOOLS, fail_fast=True),
]


class NamedFunction(Body):
    name: FunctionName


class NamedChoice(Body):
    type: Literal["function"]
    function: NamedFunction


class ManyAllowed(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: ManyAllowed


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice


class JsonSchema(Body):
    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The answer always follows the schema, strict or not.")


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(Sampled):
    messages: Messages
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="Default: what the context has.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = Field(None, description="Default auto.")
    parallel_tool_calls: bool | None = Field(None, description="Default true.")

    @property
    def has_grammar(self) -> bool:
        return bool(self.structured_outputs or self.response_format or self.tools)


class EmbeddingRequest(Body):
    """Vectors of texts: the mean of the final hidden states of a causal model, of length 1."""

    model: str
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = Field(None, description="Default float.")
    dimensions: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Keep so many numbers of each vector, scaled to length 1."
    )
    user: str | None = None


class TokenizeRequest(Body):
    """`messages` as the chat endpoint would feed them, or `prompt` as the completions endpoint would."""

    model: str | None = None
    messages: Messages | None = None
    prompt: str | None = None
    tools: Tools | None = None
    add_special_tokens: bool | None = Field(None, description="Of a prompt; default true.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
