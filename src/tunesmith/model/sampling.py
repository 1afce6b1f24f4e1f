"""From logits to the next token, one row a request, each with its own parameters and its own randomness.

Shapes: B rows, V vocabulary. A row is drawn by inverting the cumulative distribution, in vocabulary order,
at a number from the request's own generator: what else is in the batch cannot change it.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import UserError
from tunesmith.model.grammar import Grammars, Matcher
from tunesmith.model.requests import Logprobs, SamplingParams

FIRST_CANDIDATES = 256
# Few rows' probabilities stay in the processor's cache: three times as fast as 32 rows at once.
ROWS_DRAWN_ON_CPU = 4
# What `sample` gives instead of a token.
BROKEN, NOTHING_ALLOWED = -1, -2


class RowState:
    """What sampling remembers of one request: its random numbers, its tokens, its place in the grammar.

    prompt: its tokens, which only the repetition penalty looks at. Raises UserError for a grammar that does
    not compile (`Grammars.check` tells before), or when there is one and no `grammars`.
    """

    __slots__ = ("_bias", "counts", "ended", "matcher", "params", "plain", "random", "seen")

    def __init__(
        self, params: SamplingParams, grammars: Grammars | None = None, prompt: Sequence[int] = ()
    ) -> None:
        self.params = params
        self.random = random.Random(params.seed)
        self.counts: Counter[int] = Counter()
        self.seen: set[int] = set(prompt) if params.repetition_penalty != 1 else set()
        self._bias = dict(params.logit_bias)
        penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1)
        self.plain = not (any(penalties) or params.logit_bias)
        self.matcher: Matcher | None = None
        self.ended = False
        if params.grammar is not None:
            if grammars is None:
                raise UserError(f"grammar: {params.grammar.kind} is not possible here: there is no tokenizer")
            self.matcher = grammars.matcher(params.grammar)

    def count(self, token_id: int) -> None:
        """Take a token of the answer. Afterwards `ended` says whether the grammar ends the answer with it."""
        if not self.plain:
            self.counts[token_id] += 1
            if self.params.repetition_penalty != 1:
                self.seen.add(token_id)
        if self.matcher is not None and token_id not in self.params.stop_ids:
            self.matcher.advance(token_id)
            self.ended = self.matcher.is_done

    def change(self, logits: Tensor) -> None:
        """Add bias and penalties to this row's logits [V], in place."""
        if self.seen:
            self._discourage(logits)
        change = dict(self._bias)
        for token, times in self.counts.items():
            penalty = self.params.presence_penalty + self.params.frequency_penalty * times
            change[token] = change.get(token, 0.0) - penalty
        if change:
            ids = torch.tensor(list(change), device=logits.device)
            logits[ids] += torch.tensor(list(change.values()), device=logits.device, dtype=logits.dtype)

    def _discourage(self, logits: Tensor) -> None:
        """The repetition penalty of CTRL (Keskar et al. 2019): away from 0 in the direction of unlikely."""
        ids = torch.tensor(list(self.seen), device=logits.device)
        found, penalty = logits[ids], self.params.repetition_penalty
        logits[ids] = torch.where(found > 0, found / penalty, found * penalty)


def sample(logits: Tensor, rows: Sequence[RowState]) -> list[int]:
    """The next token of each row of `logits` [B, V].

    BROKEN for a row whose logits are not finite, or whose grammar was left; NOTHING_ALLOWED for one whose
    grammar lets nothing follow. Changes `logits` where a row has a bias, penalties or a grammar: take
    log-probabilities first.
    """
    for index, row in enumerate(rows):
        if not row.plain:
            row.change(logits[index])
    over = _keep_to_grammars(logits, rows)
    best = logits.max(-1)
    tokens: list[int] = best.indices.tolist()
    for index, value in enumerate(best.values.tolist()):
        if not math.isfinite(value):
            tokens[index] = over.get(index, BROKEN) if value == -math.inf else BROKEN
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and tokens[i] >= 0]
    together = ROWS_DRAWN_ON_CPU if logits.device.type == "cpu" else len(rows)
    for start in range(0, len(drawn), together):
        some = drawn[start : start + together]
        adjacent = some[-1] - some[0] == len(some) - 1
        few = logits[some[0] : some[-1] + 1] if adjacent else logits[some]
        for index, token in zip(some, _draw(few, [rows[i] for i in some]), strict=True):
            tokens[index] = token
    return tokens


def _keep_to_grammars(logits: Tensor, rows: Sequence[RowState]) -> dict[int, int]:
    """Give -inf to what may not follow; of each row with a grammar what it gives if that is everything."""
    bound = {i: row.matcher for i, row in enumerate(rows) if row.matcher is not None}
    if not bound:
        return {}
    masks = forbidden(list(bound.values()), logits.shape[1])
    for mask, (index, matcher) in zip(masks, bound.items(), strict=True):
        _keep_to_stop_ids(mask, matcher, rows[index].params.stop_ids)
    # Row by row: no row is copied, and those without a grammar are not touched.
    for mask, index in zip(masks.to(logits.device), bound, strict=True):
        logits[index].masked_fill_(mask, -math.inf)
    return {i: NOTHING_ALLOWED if matcher.may_end else BROKEN for i, matcher in bound.items()}


def _keep_to_stop_ids(forbidden_V: Tensor, matcher: Matcher, stop_ids: Sequence[int]) -> None:
    """Of the tokenizer's stop tokens only this request's; its further ones where the answer may end."""
    known = matcher.grammars.stop_ids
    for token in known.difference(stop_ids):
        forbidden_V[token] = True
    for token in set(stop_ids) - known:
        forbidden_V[token] = not matcher.may_end


def _draw(logits: Tensor, rows: list[RowState]) -> list[int]:
    """One token for each row of `logits` [B, V] by its temperature, top_k, top_p and min_p.

    min_p: Nguyen et al. 2024 (https://arxiv.org/abs/2407.01082).
    """
    scaled = logits.float()
    if any(r.params.temperature != 1 for r in rows):
        temperature = torch.tensor([max(r.params.temperature, 1e-5) for r in rows], device=logits.device)
        scaled = scaled / temperature[:, None]
    probs = torch.softmax(scaled, -1)
    narrow = [i for i, r in enumerate(rows) if r.params.top_p < 1 or 0 < r.params.top_k < probs.shape[1]]
    if narrow:
        probs[narrow] = restrict(
            probs[narrow], [rows[i].params.top_k for i in narrow], [rows[i].params.top_p for i in narrow]
        )
    if any(r.params.min_p for r in rows):
        least = torch.tensor([[r.params.min_p] for r in rows], device=logits.device)
        probs = torch.where(probs < least * probs.amax(-1, keepdim=True), 0.0, probs)
    # In float64: a float32 running sum over a large vocabulary would shift the drawn position.
    total = probs.cumsum(-1, dtype=torch.float64)
    at = torch.tensor([[r.random.random()] for r in rows], dtype=torch.float64, device=logits.device)
    picked = torch.searchsorted(total, at * total[:, -1:], right=True)
    return picked.clamp_(max=probs.shape[1] - 1)[:, 0].tolist()


def restrict(probs: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """`probs` [B, V] with 0 for every token outside its row's top_k and top_p (not normalised again).

    top_p keeps the smallest set of likeliest tokens whose share of the top_k mass reaches it (nucleus
    sampling, Holtzman et al. 2020). Looks at the likeliest few first and sorts the whole vocabulary only
    for a row so flat that these do not suffice. How many it looks at depends on the row alone: among equal
    probabilities `topk` chooses by that number.
    """
    vocab = probs.shape[1]
    kept = torch.empty_like(probs)
    by_width: dict[int, list[int]] = {}
    for row, k in enumerate(top_k):
        by_width.setdefault(_candidates(k, vocab), []).append(row)
    while by_width:
        width = min(by_width)
        rows = by_width.pop(width)
        own_k, own_p = [top_k[row] for row in rows], [top_p[row] for row in rows]
        kept[rows], enough = _restrict_to(probs[rows], own_k, own_p, width)
        if flat := [row for row, done in zip(rows, enough, strict=True) if not done]:
            by_width.setdefault(vocab, []).extend(flat)
    return kept


def _candidates(top_k: int, vocab: int) -> int:
    """How many of the likeliest tokens are looked at first: enough for top_k."""
    width = FIRST_CANDIDATES
    while width < top_k < vocab:
        width *= 2
    return min(width, vocab)


def _restrict_to(
    probs: Tensor, top_k: Sequence[int], top_p: Sequence[float], width: int
) -> tuple[Tensor, list[bool]]:
    """`restrict` among the `width` likeliest, and for each row whether these suffice."""
    vocab = probs.shape[1]
    k = torch.tensor([[t if 0 < t < vocab else vocab] for t in top_k], device=probs.device)
    p = torch.tensor([[t] for t in top_p], device=probs.device)
    top = probs.topk(width, sorted=True)
    ranked = torch.where(torch.arange(width, device=probs.device) < k, top.values, 0.0)
    mass = torch.where(k <= width, ranked.sum(-1, keepdim=True), 1.0)
    before = ranked.cumsum(-1) - ranked
    enough = (k <= width) | (p < 1) & (before[:, -1:] >= p * mass)
    kept = torch.where((before < p * mass) | (p >= 1), ranked, 0.0)
    return torch.zeros_like(probs).scatter_(-1, top.indices, kept), enough[:, 0].tolist()


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


def forbidden(matchers: Sequence[Matcher], vocab_size: int) -> Tensor:
    """[B, V] bool: the tokens that may not follow in each row. The matchers are of one `Grammars`."""
    words = np.zeros((len(matchers), matchers[0].grammars.num_words), dtype=np.int32)
    for matcher, row in zip(matchers, words, strict=True):
        if not matcher.failed:
            matcher.fill(row)
    bits = np.unpackbits(np.invert(words).view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))
