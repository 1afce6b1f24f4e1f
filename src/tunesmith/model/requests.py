"""What is asked of a generator and what it tells back, as plain data that another process can send."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from tunesmith.core.errors import UserError
from tunesmith.model.grammar import GrammarSpec

MAX_LOGPROBS = 20
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    temperature 0 is greedy (top_p, top_k, min_p and seed then play no part). top_k 0, top_p 1 and min_p 0
    keep every token; top_k is applied first, top_p to what it leaves, and of that min_p drops what is less
    than min_p times as likely as the likeliest. seed None draws a new one. stop_ids end the answer and are
    not part of it. logprobs: None for none, else the chosen token's and this many of the likeliest;
    prompt_logprobs: the same for the prompt. Both are of the model's own distribution, before temperature,
    bias, penalties and grammar. presence_penalty and frequency_penalty count the answer's tokens, not the
    prompt's; repetition_penalty (above 1: discourage) acts on the tokens of both, before the other two and
    logit_bias; all four act in greedy decoding too. grammar: what the answer must look like; a stop token is
    allowed only where it may end, and where nothing can follow the answer ends without one.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    grammar: GrammarSpec | None = None

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 or more")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 (off) to 1")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(name, value, value is None or 0 <= value <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "-2 to 2")
        repetition = self.repetition_penalty
        _check("repetition_penalty", repetition, 0 < repetition < math.inf, "above 0; 1 is off")

    def with_seed(self, seed: int) -> SamplingParams:
        return replace(self, seed=seed)


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise UserError(f"{name}: {value} is not possible", hint=f"give {wanted}")


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at one position: of the token there, and the likeliest (id, logprob), best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step did for one request.

    token_id: the new token, None when there is none (cancelled, failed, or max_new_tokens 0); a stop token
    is reported here too. finish_reason: set on the request's last event; "error" when its logits were not
    finite. prompt_logprobs: on the first event, for the prompt's tokens but the first; cached_tokens: there
    too, how many of the prompt's tokens the cache had already.
    """

    request_id: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None
    cached_tokens: int = 0
