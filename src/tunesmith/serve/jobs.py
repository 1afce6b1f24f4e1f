"""From a request's body to what the engine is asked: prompts, parameters, and who writes the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from tunesmith.core.errors import UserError
from tunesmith.model.sampling import SamplingParams
from tunesmith.model.template import encode_prompt
from tunesmith.serve.errors import ApiError
from tunesmith.serve.schema import ChatRequest, CompletionRequest, Sampled, TokenizeRequest
from tunesmith.serve.text import Answer, Detokenizer

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it. `origin` says what it is made of: run, base, adapter."""

    name: str
    tokenizer: Any
    max_length: int
    stop_ids: tuple[int, ...]
    created: int
    origin: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.tokenizer)

    def card(self) -> dict[str, Any]:
        """The entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "tunesmith",
            "max_model_len": self.max_length,
        } | self.origin


@dataclass
class Job:
    """One request: a prompt and parameters for every choice, and the answer that each becomes."""

    requests: list[tuple[Sequence[int], SamplingParams]]
    answers: list[Answer]
    prompt_tokens: int

    def usage(self) -> dict[str, int]:
        completion = sum(answer.num_tokens for answer in self.answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }


def completion_job(body: CompletionRequest, model: ServedModel) -> Job:
    """Raises ApiError for what cannot be done as asked."""
    check_model(body.model, model)
    _refuse_changed_answers(
        suffix=bool(body.suffix), best_of=body.best_of is not None and body.best_of != (body.n or 1)
    )
    texts, prompts = _prompts(body, model)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError("max_tokens: 0 is possible only together with echo", param="max_tokens")
    for prompt in prompts:
        check_length(len(prompt), max_tokens, model)
    params = _sampling(body, model, max_tokens, body.logprobs, body.logprobs if body.echo else None)
    echoes = zip(prompts, texts, strict=True) if body.echo else [None] * len(prompts)
    return _job(body, model, list(zip(prompts, echoes, strict=True)), params)


def chat_job(body: ChatRequest, model: ServedModel) -> Job:
    """Raises ApiError for what cannot be done as asked, UserError for messages the template refuses."""
    check_model(body.model, model)
    _refuse_changed_answers(
        response_format=body.response_format is not None and body.response_format.type != "text",
        tool_choice=body.tool_choice not in (None, "auto", "none"),
        parallel_tool_calls=body.parallel_tool_calls is False and bool(body.tools),
    )
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs: needs logprobs: true", param="top_logprobs")
    prompt = chat_prompt(model, body.messages, None if body.tool_choice == "none" else body.tools)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    check_length(len(prompt), limit or 1, model)
    max_tokens = limit or model.max_length - len(prompt)
    params = _sampling(body, model, max_tokens, (body.top_logprobs or 0) if body.logprobs else None, None)
    return _job(body, model, [(prompt, None)], params)


def tokenize(body: TokenizeRequest, model: ServedModel) -> list[int]:
    """The token ids that the chat endpoint (messages) or the completions endpoint (prompt) feeds."""
    if body.model is not None:
        check_model(body.model, model)
    if (body.messages is None) == (body.prompt is None):
        raise ApiError("give either messages or prompt", param="messages")
    if body.messages is not None:
        return chat_prompt(model, body.messages, body.tools)
    return cast("list[int]", model.tokenizer(body.prompt).input_ids)


def chat_prompt(
    model: ServedModel, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[int]:
    try:
        return encode_prompt(model.tokenizer, messages, tools)
    except UserError as error:
        raise ApiError(str(error).replace("\n\nhint:", ". Hint:"), param="messages") from None


def check_model(name: str, model: ServedModel) -> None:
    if name != model.name:
        raise ApiError(
            f"the model '{name}' does not exist; this server has '{model.name}'",
            status=404,
            param="model",
            code="model_not_found",
        )


def check_length(prompt_tokens: int, max_tokens: int, model: ServedModel) -> None:
    if prompt_tokens + max_tokens > model.max_length:
        raise ApiError(
            f"this model's maximum context length is {model.max_length} tokens; the request needs "
            f"{prompt_tokens + max_tokens} ({prompt_tokens} in the prompt, {max_tokens} for the answer)",
            param="messages" if max_tokens == 1 else "max_tokens",
            code="context_length_exceeded",
        )


def _refuse_changed_answers(**asked: bool) -> None:
    """A field that we do not do must not be ignored: the answer would not be what was asked for."""
    for param, is_asked in asked.items():
        if is_asked:
            raise ApiError(
                f"'{param}' is not supported in this form", param=param, code="unsupported_parameter"
            )


def _prompts(body: CompletionRequest, model: ServedModel) -> tuple[list[str], list[list[int]]]:
    """Text and token ids of every prompt; text gets the special tokens that the tokenizer puts before it."""
    given = body.prompt
    single = isinstance(given, str) or isinstance(given[0], int)
    texts: list[str] = []
    prompts: list[list[int]] = []
    for prompt in [given] if single else given:
        ids = cast("list[int]", model.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt)
        if not ids:
            raise ApiError("the prompt has no tokens", param="prompt")
        prompts.append(ids)
        texts.append(prompt if isinstance(prompt, str) else model.detokenizer.decode(ids))
    return texts, prompts


def _sampling(
    body: Sampled, model: ServedModel, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        stop_ids=() if body.ignore_eos else model.stop_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
    )


def _job(
    body: Sampled, model: ServedModel, prompts: list[tuple[list[int], Any]], params: SamplingParams
) -> Job:
    """`n` choices of every prompt; a choice's seed is the request's plus its number."""
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options: only together with stream: true", param="stream_options")
    requests: list[tuple[Sequence[int], SamplingParams]] = []
    answers = []
    for prompt, echo in prompts:
        for number in range(body.n or 1):
            seeded = params if params.seed is None else params.with_seed(params.seed + number)
            requests.append((prompt, seeded))
            answers.append(Answer(model.detokenizer, stops=body.stops, stop_ids=params.stop_ids, echo=echo))
    return Job(requests, answers, sum(len(prompt) for prompt, _ in prompts))
