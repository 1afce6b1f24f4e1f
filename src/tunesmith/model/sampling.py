"""From logits to the next token, one row a request, each with its own parameters and its own randomness.

Shapes: B rows, V vocabulary. A row is drawn by inverting the cumulative distribution, in vocabulary order,
at a number from the request's own generator: what else is in the batch cannot change it.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tunesmith.core.errors import UserError

MAX_LOGPROBS = 20
FIRST_CANDIDATES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    temperature 0 is greedy (top_p, top_k and seed then play no part). top_k 0 and top_p 1 keep every token;
    top_k is applied first, top_p to what it leaves. seed None draws a new one. stop_ids end the answer and
    are not part of it. logprobs: None for none, else the chosen token's and this many of the likeliest;
    prompt_logprobs: the same for the prompt. Both are of the model's own distribution, before temperature,
    bias and penalties. Penalties count the answer's tokens, not the prompt's; penalties and logit_bias
    act in greedy decoding too.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 or more")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _check(name, value, value is None or 0 <= value <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "-2 to 2")

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


class RowState:
    """What sampling remembers of one request: its random numbers and the tokens it has produced."""

    __slots__ = ("_bias", "counts", "params", "plain", "random")

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.random = random.Random(params.seed)
        self.counts: Counter[int] = Counter()
        self._bias = dict(params.logit_bias)
        self.plain = not (params.presence_penalty or params.frequency_penalty or params.logit_bias)

    def count(self, token_id: int) -> None:
        if not self.plain:
            self.counts[token_id] += 1

    def change(self, logits: Tensor) -> None:
        """Add bias and penalties to this row's logits [V], in place."""
        change = dict(self._bias)
        for token, times in self.counts.items():
            penalty = self.params.presence_penalty + self.params.frequency_penalty * times
            change[token] = change.get(token, 0.0) - penalty
        if change:
            ids = torch.tensor(list(change), device=logits.device)
            logits[ids] += torch.tensor(list(change.values()), device=logits.device, dtype=logits.dtype)


def sample(logits: Tensor, rows: Sequence[RowState]) -> list[int]:
    """The next token of each row of `logits` [B, V]; -1 for a row whose logits are not finite.

    Changes `logits` where a row has a bias or penalties: take log-probabilities first.
    """
    for index, row in enumerate(rows):
        if not row.plain:
            row.change(logits[index])
    best = logits.max(-1)
    tokens: list[int] = best.indices.tolist()
    for index, value in enumerate(best.values.tolist()):
        if not math.isfinite(value):
            tokens[index] = -1
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and tokens[i] >= 0]
    if drawn:
        picked = _draw(logits if len(drawn) == len(rows) else logits[drawn], [rows[i] for i in drawn])
        for index, token in zip(drawn, picked, strict=True):
            tokens[index] = token
    return tokens


def _draw(logits: Tensor, rows: list[RowState]) -> list[int]:
    """One token for each row of `logits` [B, V] by its temperature, top_k and top_p."""
    temperature = torch.tensor([max(r.params.temperature, 1e-5) for r in rows], device=logits.device)
    probs = torch.softmax(logits.float() / temperature[:, None], -1)
    narrow = [i for i, r in enumerate(rows) if r.params.top_p < 1 or 0 < r.params.top_k < probs.shape[1]]
    if narrow:
        probs[narrow] = restrict(
            probs[narrow], [rows[i].params.top_k for i in narrow], [rows[i].params.top_p for i in narrow]
        )
    # In float64: a float32 running sum over a large vocabulary would shift the drawn position.
    total = probs.cumsum(-1, dtype=torch.float64)
    at = torch.tensor([[r.random.random()] for r in rows], dtype=torch.float64, device=logits.device)
    picked = torch.searchsorted(total, at * total[:, -1:], right=True)
    return picked.clamp_(max=probs.shape[1] - 1)[:, 0].tolist()


def restrict(probs: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """`probs` [B, V] with 0 for every token outside its row's top_k and top_p (not normalised again).

    top_p keeps the smallest set of likeliest tokens whose share of the top_k mass reaches it (nucleus
    sampling, Holtzman et al. 2020). Looks at the likeliest few first and sorts the whole vocabulary only
    for a row so flat that these do not suffice.
    """
    vocab = probs.shape[1]
    k = torch.tensor([[t if 0 < t < vocab else vocab] for t in top_k], device=probs.device)
    p = torch.tensor([[t] for t in top_p], device=probs.device)
    width = min(vocab, max(FIRST_CANDIDATES, *(t for t in top_k if t < vocab), 0))
    while True:
        top = probs.topk(width, sorted=True)
        ranked = torch.where(torch.arange(width, device=probs.device) < k, top.values, 0.0)
        mass = torch.where(k <= width, ranked.sum(-1, keepdim=True), 1.0)
        before = ranked.cumsum(-1) - ranked
        if width == vocab or bool(((k <= width) | (p < 1) & (before[:, -1:] >= p * mass)).all()):
            break
        width = vocab
    kept = torch.where((before < p * mass) | (p >= 1), ranked, 0.0)
    return torch.zeros_like(probs).scatter_(-1, top.indices, kept)


def logprobs_of(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[Logprobs]:
    """Of each row of `logits` [B, V]: the logprob of its token in `token_ids`, and its `num_top` best."""
    table = torch.log_softmax(logits.float(), -1)
    ids = torch.tensor(list(token_ids), device=table.device)
    chosen = table.gather(1, ids[:, None])[:, 0].tolist()
    top = table.topk(num_top, sorted=True) if num_top else None
    found = []
    for row, token in enumerate(token_ids):
        likeliest = zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True) if top else ()
        found.append(Logprobs(token, chosen[row], tuple(likeliest)))
    return found
