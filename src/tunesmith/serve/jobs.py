"""From a request's body to what the engine is asked: prompts, parameters, and who writes the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from tunesmith.core.errors import UserError
from tunesmith.model.requests import SamplingParams
from tunesmith.model.template import encode_prompt
from tunesmith.serve.engine import Ask
from tunesmith.serve.errors import ApiError, one_line
from tunesmith.serve.formats import chat_plan, structured_grammar
from tunesmith.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Prompt,
    Sampled,
    TokenizeRequest,
)
from tunesmith.serve.text import Answer, Detokenizer, Piece
from tunesmith.serve.tool_grammar import ToolPlan

DEFAULT_COMPLETION_TOKENS = 16
MAX_ANSWERS = 4096
"""Of one request."""


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it. `origin` says what it is made of: run, base, adapter.

    adapter: what the engine calls the adapter that it is; None: the engine's base model.
    """

    name: str
    tokenizer: Any
    max_length: int
    stop_ids: tuple[int, ...]
    created: int
    origin: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None

    @cached_property
    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self.tokenizer)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @cached_property
    def longest_token(self) -> int:
        """Characters: no token stands for more text."""
        return max(map(len, self.tokenizer.get_vocab()))

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
    """One request: a prompt and parameters for every choice, and the answer that each becomes.

    best_of: answers to each prompt, of which the `n` likeliest are given; None: all are.
    """

    asks: list[Ask]
    answers: list[Answer]
    prompt_tokens: int
    n: int = 1
    best_of: int | None = None

    @property
    def cached_tokens(self) -> int:
        """Of the prompts, those that were in the cache before this request.

        Answers to one prompt find it there as soon as one of them has had it computed: the least counts.
        """
        each = self.best_of or self.n
        firsts = range(0, len(self.answers), each)
        return sum(min(answer.cached_tokens for answer in self.answers[at : at + each]) for at in firsts)

    def usage(self) -> dict[str, Any]:
        """Every prompt counts once, and every answer that was written, given or not."""
        completion = sum(answer.num_tokens for answer in self.answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def best(self, wholes: list[Piece]) -> list[Piece]:
        """The choices to give, of all that were written."""
        if self.best_of is None:
            return wholes
        kept: list[Piece] = []
        for at in range(0, len(wholes), self.best_of):
            group = range(at, at + self.best_of)
            likeliest = sorted(group, key=lambda i: -self.answers[i].mean_logprob)[: self.n]
            kept += [wholes[i] for i in likeliest]
        return kept


def completion_job(body: CompletionRequest, model: ServedModel) -> Job:
    """Raises ApiError for what cannot be done as asked."""
    _refuse(body, suffix=bool(body.suffix))
    best_of = _best_of(body)
    texts, prompts = encode_texts(body.prompt, model, param="prompt")
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError("max_tokens: 0 is possible only together with echo", param="max_tokens")
    for prompt in prompts:
        check_length(len(prompt), max_tokens, model)
    logprobs = body.logprobs if best_of is None else (body.logprobs or 0)
    params = _sampling(
        body,
        model,
        max_new_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        grammar=structured_grammar(body.structured_outputs),
    )
    echoes = zip(prompts, texts, strict=True) if body.echo else [None] * len(prompts)
    return _job(body, model, list(zip(prompts, echoes, strict=True)), params, best_of=best_of)


def _best_of(body: CompletionRequest) -> int | None:
    """None where every answer written is one asked for."""
    n = body.n or 1
    if body.best_of is None or body.best_of == n:
        return None
    if body.best_of < n:
        raise ApiError(f"best_of: {body.best_of} is less than n, which is {n}", param="best_of")
    if body.stream:
        raise ApiError("best_of: the best is known only at the end; not with stream", param="best_of")
    return body.best_of


def chat_job(body: ChatRequest, model: ServedModel) -> Job:
    """Raises ApiError for what cannot be done as asked."""
    _refuse(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs: needs logprobs: true", param="top_logprobs")
    plan, grammar = chat_plan(body, model.tokenizer)
    prompt = chat_prompt(model, body.messages, body.tools if plan else None)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    check_length(len(prompt), limit or 1, model, param="messages" if limit is None else "max_tokens")
    params = _sampling(
        body,
        model,
        max_new_tokens=limit or model.max_length - len(prompt),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=grammar,
    )
    return _job(body, model, [(prompt, None)], params, plan=plan)


def tokenize(body: TokenizeRequest, model: ServedModel) -> dict[str, Any]:
    """The token ids that the chat endpoint (messages) or the completions endpoint (prompt) feeds."""
    if (body.messages is None) == (body.prompt is None):
        raise ApiError("give either messages or prompt", param="messages")
    if body.messages is not None:
        _refuse_field("add_special_tokens", body.add_special_tokens)
        tokens = chat_prompt(model, body.messages, body.tools or None)
    else:
        _refuse_field("tools", body.tools)
        _check_text_length(len(body.prompt or ""), model, "prompt")
        special = body.add_special_tokens is not False
        tokens = cast(
            "list[int]", model.tokenizer(body.prompt, add_special_tokens=special, verbose=False).input_ids
        )
    strings = model.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return {"tokens": tokens, "count": len(tokens), "max_model_len": model.max_length, "token_strs": strings}


def detokenize(body: DetokenizeRequest, model: ServedModel) -> dict[str, Any]:
    """The text of tokens, special tokens included."""
    check_vocabulary(body.tokens, model, param="tokens")
    return {"prompt": model.detokenizer.decode(body.tokens, skip_special=False)}


def chat_prompt(
    model: ServedModel, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[int]:
    said = sum(len(text) for message in messages if isinstance(text := message.get("content"), str))
    _check_text_length(said, model, "messages")
    try:
        return encode_prompt(model.tokenizer, messages, tools)
    except UserError as error:
        raise ApiError(one_line(error), param="messages") from None
    except (RecursionError, LookupError, AttributeError, ArithmeticError) as error:
        # A template is a program over what the client sent, and may fail on it in any way.
        raise ApiError(
            f"the model's chat template fails on these messages: {type(error).__name__}: {error}"[:400],
            param="messages",
        ) from None


def check_length(
    prompt_tokens: int, max_tokens: int, model: ServedModel, *, param: str = "max_tokens"
) -> None:
    if prompt_tokens + max_tokens > model.max_length:
        raise ApiError(
            f"this model's maximum context length is {model.max_length} tokens; the request needs "
            f"{prompt_tokens + max_tokens} ({prompt_tokens} in the prompt, {max_tokens} for the answer)",
            param=param,
            code="context_length_exceeded",
        )


def _check_text_length(characters: int, model: ServedModel, param: str) -> None:
    """Refuse text that is far too long before it is tokenised, which takes 250 bytes of memory for each."""
    # Twice: a normalizer may drop characters before they are tokenised.
    if characters > 2 * model.max_length * model.longest_token:
        raise ApiError(
            f"this model's maximum context length is {model.max_length} tokens; {characters} characters "
            "are more than that in any case",
            param=param,
            code="context_length_exceeded",
        )


def check_vocabulary(tokens: Sequence[int], model: ServedModel, *, param: str) -> None:
    """Raises ApiError for an id that no token has."""
    size = model.vocab_size
    bad = next((token for token in tokens if token >= size), None)
    if bad is not None:
        raise ApiError(f"{param}: {bad} is not in the vocabulary of {size} tokens", param=param)


def _refuse(body: Sampled, **asked: bool) -> None:
    """A field that we do not do must not be ignored: the answer would not be what was asked for."""
    for param, is_asked in (asked | {"store": bool(body.store)}).items():
        if is_asked:
            raise ApiError(
                f"'{param}' is not supported in this form", param=param, code="unsupported_parameter"
            )
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options: only together with stream: true", param="stream_options")


def _refuse_field(param: str, value: object) -> None:
    if value is not None:
        raise ApiError(f"'{param}' has no effect here", param=param, code="unsupported_parameter")


def encode_texts(given: Prompt, model: ServedModel, *, param: str) -> tuple[list[str], list[list[int]]]:
    """Text and token ids of every prompt; text gets the special tokens that the tokenizer puts before it."""
    single = isinstance(given, str) or isinstance(given[0], int)
    texts: list[str] = []
    prompts: list[list[int]] = []
    for prompt in [given] if single else given:
        if isinstance(prompt, str):
            _check_text_length(len(prompt), model, param)
        ids = cast(
            "list[int]",
            model.tokenizer(prompt, verbose=False).input_ids if isinstance(prompt, str) else prompt,
        )
        if not ids:
            raise ApiError(f"{param}: has no tokens", param=param)
        check_vocabulary(ids, model, param=param)
        prompts.append(ids)
        texts.append(prompt if isinstance(prompt, str) else model.detokenizer.decode(ids))
    return texts, prompts


def _sampling(body: Sampled, model: ServedModel, **more: Any) -> SamplingParams:
    """What is not given has OpenAI's default; nothing comes from the model's generation_config.json."""
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        seed=body.seed,
        stop_ids=() if body.ignore_eos else model.stop_ids,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): value for token, value in (body.logit_bias or {}).items()},
        **more,
    )


def _job(
    body: Sampled,
    model: ServedModel,
    prompts: list[tuple[list[int], Any]],
    params: SamplingParams,
    *,
    best_of: int | None = None,
    plan: ToolPlan | None = None,
) -> Job:
    """`n` choices of every prompt; a choice's seed is the request's plus its number."""
    check_vocabulary(list(params.logit_bias), model, param="logit_bias")
    each = best_of or body.n or 1
    if each * len(prompts) > MAX_ANSWERS:
        raise ApiError(f"n: {each} answers to each of {len(prompts)} prompts are too many", param="n")
    asks: list[Ask] = []
    answers = []
    for prompt, echo in prompts:
        for number in range(each):
            seeded = params if params.seed is None else params.with_seed(params.seed + number)
            asks.append(Ask(prompt, seeded, model.adapter))
            answers.append(
                Answer(
                    model.detokenizer,
                    stops=body.stops,
                    stop_ids=params.stop_ids,
                    echo=echo,
                    calls=plan.parser() if plan else None,
                    kept=plan.marker_ids if plan else frozenset(),
                )
            )
    tokens = sum(len(prompt) for prompt, _ in prompts)
    return Job(asks, answers, tokens, n=body.n or 1, best_of=best_of)
