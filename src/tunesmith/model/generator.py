"""Continuous batching: many requests advance together, one flat forward pass at a time.

A pass carries one token of every request that is answered and a chunk of the prompts; `scheduler` says which.
Nothing is padded except inside decode attention (kv_cache). No random state but each request's own is used:
torch's generators stay as they were.

Shapes: T tokens of a pass, R rows that need logits, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.core.errors import UserError
from tunesmith.model import attention, cpu_kernels
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.fast_decode import make_forward
from tunesmith.model.fast_linear import fast_head
from tunesmith.model.grammar import Grammars
from tunesmith.model.kv_cache import CacheLayout, Chunk, KVCache, default_cache_tokens
from tunesmith.model.limits import Limits
from tunesmith.model.pages import PAGE, PagePool, pages_for
from tunesmith.model.requests import FinishReason, Logprobs, SamplingParams, TokenEvent
from tunesmith.model.sampling import BROKEN, NOTHING_ALLOWED, RowState, logprobs_of, sample
from tunesmith.model.scheduler import Request, Scheduler

PREFILL_TOKENS = 256
LOGIT_ROWS = 128


@dataclass(eq=False, slots=True, kw_only=True)
class _Request(Request):
    params: SamplingParams
    row: RowState
    adapter: str | None = None
    prompt_logprobs: list[Logprobs] = field(default_factory=list)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True until they are complete: they come with the first new token."""
        return self.params.prompt_logprobs is not None and not self.num_produced

    def num_reusable(self) -> int:
        most = Request.num_reusable(self)
        # A token's log-probability is computed from the hidden state of the one before.
        return min(most, len(self.prompt_logprobs)) if self.wants_prompt_logprobs else most


Planned = list[tuple[_Request, int]]


class Generator:
    """The synchronous core: `add` requests, call `step` until there is no work.

    model: a causal language model (or PeftModel) in eval mode. max_length: most tokens of a prompt and its
    answer together; an answer that reaches it ends with "length". max_concurrent: requests computed
    together; the others wait in line. prefill_tokens: most prompt tokens of a pass. cache_tokens: how many
    tokens' keys and values are kept, for running requests and for prompts that begin alike; default: room
    for max_concurrent requests, within `default_cache_tokens`. cache_dtype: what they
    are rounded to; default: not at all. bank: adapters of `model`, which requests name. grammars: for
    requests that have a grammar.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_length: int | None = None,
        max_concurrent: int = 16,
        prefill_tokens: int = PREFILL_TOKENS,
        cache_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        bank: AdapterBank | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.max_length = max_length or context_length(model)
        attention.install(model, max_length=self.max_length)
        self.model = model
        self.bank = bank
        self._grammars = grammars
        self._dtype, self._device = computed_in(model)
        with torch.inference_mode():
            self._head = fast_head(attention.lm_head(model))
        self._forward_pass = make_forward(model)
        if cache_tokens is None:
            wanted, stored = max_concurrent * self.max_length, cache_dtype or self._dtype
            cache_tokens = default_cache_tokens(model, stored, wanted, self.max_length)
        pool = PagePool(pages_for(cache_tokens))
        self.limits = Limits(self.max_length, vocab_size(model), pool.num_pages * PAGE)
        self._cache = new_cache(pool.num_pages, self._dtype, self._device, cache_dtype)
        self._scheduler = Scheduler[_Request](
            pool, max_concurrent=max_concurrent, prefill_tokens=prefill_tokens
        )
        self._cancelled: set[int] = set()
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def prompt_tokens(self) -> int:
        """Of all requests that have begun to run."""
        return self._scheduler.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """How many of `prompt_tokens` were not computed, because the cache had them."""
        return self._scheduler.cached_tokens

    @property
    def preempted(self) -> int:
        """How often a running request gave up its cache pages for others."""
        return self._scheduler.preempted

    @property
    def cache_tokens_used(self) -> int:
        """Room of the pages that running requests hold."""
        return self._scheduler.pool.num_used * PAGE

    @property
    def cache_capacity(self) -> int:
        return self._scheduler.pool.num_pages * PAGE

    def check(self, prompt: Sequence[int], params: SamplingParams, adapter: str | None = None) -> None:
        """Raise UserError when this prompt cannot be continued in this way at all."""
        self.limits.check(prompt, max_new_tokens=params.max_new_tokens, biased=params.logit_bias.keys())
        self._check_adapter(adapter)
        self._check_grammar(params)

    def add(self, prompt: Sequence[int], params: SamplingParams, *, adapter: str | None = None) -> int:
        """Put a request in line; the number that its events carry. Raises UserError as `check` does."""
        self.check(prompt, params, adapter)
        request = _Request(
            self._next_id,
            list(prompt),
            len(prompt),
            root=self._root(adapter),
            params=params,
            row=RowState(params, self._grammars, prompt),
            adapter=adapter,
        )
        self._next_id += 1
        self._scheduler.add(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request at the next step, where its last event says "cancelled". Unknown ids are ignored."""
        self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One forward pass: at most one new token for every running request."""
        events = self._drop_cancelled()
        planned = self._scheduler.plan()
        if planned:
            hidden = self._forward(planned)
            self._scheduler.advance(planned)
            events += self._advance(planned, hidden)
        return events

    @torch.inference_mode()
    def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Of each prompt the mean of its final hidden states, scaled to length 1: D numbers.

        Raises UserError as `check` does. Requests that run are not touched.
        """
        self._check_adapter(adapter)
        for prompt in prompts:
            self.limits.check(prompt)
        return [self._embed(prompt, adapter) for prompt in prompts]

    def _embed(self, prompt: Sequence[int], adapter: str | None) -> list[float]:
        ids = torch.tensor([list(prompt)], device=self._device)
        positions = torch.arange(len(prompt), device=self._device)[None]
        with self._selected([(adapter, len(prompt))]):
            hidden = self._forward_pass(ids, positions, attention.PackedLayout([0, len(prompt)]))
        mean: list[float] = torch.nn.functional.normalize(hidden[0].float().mean(0), dim=0).tolist()
        return mean

    def _check_adapter(self, adapter: str | None) -> None:
        if self.bank is not None:
            self.bank.check(adapter)
        elif adapter is not None:
            raise UserError(f"adapter '{adapter}': this model is used without adapters")

    def _check_grammar(self, params: SamplingParams) -> None:
        if params.grammar is not None and self._grammars is not None:
            self._grammars.check(params.grammar)
        elif params.grammar is not None:
            raise UserError(f"grammar: {params.grammar.kind} is not possible here: there is no tokenizer")

    def _root(self, adapter: str | None) -> bytes:
        """What a cached page depends on besides its tokens: an adapter loaded anew has other keys."""
        if adapter is None or self.bank is None:
            return b""
        return f"{self.bank.version(adapter)} {adapter}".encode()

    def _drop_cancelled(self) -> list[TokenEvent]:
        if not self._cancelled:
            return []
        line = (*self._scheduler.running, *self._scheduler.waiting)
        gone = [request for request in line if request.id in self._cancelled]
        self._cancelled.clear()
        for request in gone:
            self._scheduler.remove(request)
        return [TokenEvent(request.id, None, "cancelled") for request in gone]

    def _forward(self, planned: Planned) -> Tensor:
        """Final hidden states [T, D] of the pass."""
        ids = [t for r, count in planned for t in r.tokens[r.computed : r.computed + count]]
        chunks = [Chunk(r.pages, r.computed, count) for r, count in planned]
        layout = CacheLayout(self._cache, chunks, dtype=self._dtype, device=self._device)
        input_ids = torch.tensor(ids, device=self._device)[None]
        with self._selected([(r.adapter, count) for r, count in planned]):
            return self._forward_pass(input_ids, layout.positions[None], layout)[0]

    def _selected(self, spans: list[tuple[str | None, int]]) -> AbstractContextManager[None]:
        return nullcontext() if self.bank is None else self.bank.selected(spans)

    def _logits(self, hidden: Tensor, spans: list[tuple[str | None, int]]) -> Tensor:
        """[R, V] of some rows of hidden states; an adapter of a span may change the head."""
        logits = self._head(hidden)
        if self.bank is None:
            return logits
        return self.bank.add_(attention.lm_head(self.model), hidden, logits, spans)

    def _advance(self, planned: Planned, hidden: Tensor) -> list[TokenEvent]:
        """Sample where a sequence's last token has been computed; the events of the step."""
        ready: list[_Request] = []
        last_rows: list[int] = []
        end = 0
        for request, count in planned:
            end += count
            if request.wants_prompt_logprobs:
                self._add_prompt_logprobs(request, hidden[end - count : end])
            if request.num_left == 0:
                ready.append(request)
                last_rows.append(end - 1)
        if not ready:
            return []
        if len(last_rows) != end:
            hidden = hidden[torch.tensor(last_rows, device=hidden.device)]
        return self._sample(ready, self._logits(hidden, [(r.adapter, 1) for r in ready]))

    def _sample(self, ready: list[_Request], logits: Tensor) -> list[TokenEvent]:
        wanted = [i for i, r in enumerate(ready) if r.params.logprobs is not None]
        raw = logits[wanted] if wanted else None
        tokens = sample(logits, [r.row for r in ready])
        found: dict[int, Logprobs] = {}
        if raw is not None:
            most = max(ready[i].params.logprobs or 0 for i in wanted)
            found = dict(
                zip(wanted, logprobs_of(raw, [max(tokens[i], 0) for i in wanted], most), strict=True)
            )
        return [
            self._event(r, token, found.get(i))
            for i, (r, token) in enumerate(zip(ready, tokens, strict=True))
        ]

    def _event(self, request: _Request, token: int, logprobs: Logprobs | None) -> TokenEvent:
        params = request.params
        cached = 0 if request.num_produced else request.num_cached
        prompt = tuple(request.prompt_logprobs) if request.wants_prompt_logprobs else None
        reason: FinishReason | None = None
        new: int | None = token
        if token == BROKEN:
            reason, new, logprobs = "error", None, None
        elif params.max_new_tokens == 0:
            reason, new, logprobs = "length", None, None
        elif token == NOTHING_ALLOWED:
            reason, new, logprobs = "stop", None, None
        else:
            request.tokens.append(token)
            request.row.count(token)
            if token in params.stop_ids or request.row.ended:
                reason = "stop"
            elif request.num_produced >= params.max_new_tokens or len(request.tokens) >= self.max_length:
                reason = "length"
        if reason is not None:
            self._scheduler.remove(request, forget=reason == "error")
        return TokenEvent(request.id, new, reason, _cut(logprobs, params.logprobs), prompt, cached)

    def _add_prompt_logprobs(self, request: _Request, hidden: Tensor) -> None:
        """`hidden` [count, D] are the hidden states of the request's newest tokens."""
        known = len(request.prompt_logprobs)
        # After a preemption the first of them may be known already.
        hidden = hidden[known - (request.computed - len(hidden)) :]
        targets = request.tokens[known + 1 : request.computed + 1]
        for at in range(0, len(targets), LOGIT_ROWS):
            piece = targets[at : at + LOGIT_ROWS]
            logits = self._logits(hidden[at : at + len(piece)], [(request.adapter, len(piece))])
            request.prompt_logprobs += logprobs_of(logits, piece, request.params.prompt_logprobs or 0)


def vocab_size(model: nn.Module) -> int:
    """V: how many logits the model's head gives."""
    head: Any = attention.lm_head(model)
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def computed_in(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Number format and device of the hidden states; weights may be stored in other formats."""
    embeddings = attention.unwrapped(model).get_input_embeddings()
    device = next(model.parameters()).device
    with torch.inference_mode():
        return embeddings(torch.zeros(1, dtype=torch.int64, device=device)).dtype, device


def new_cache(
    num_pages: int, dtype: torch.dtype, device: torch.device, cache_dtype: torch.dtype | None = None
) -> KVCache:
    """A cache for a model that computes in `dtype` on `device`, with kernels where they can be had."""
    known = all(cpu_kernels.Kernels.knows(kind) for kind in (dtype, cache_dtype or dtype))
    return KVCache(num_pages, cpu_kernels.load() if device.type == "cpu" and known else None, cache_dtype)


def context_length(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().max_position_embeddings)


def _cut(logprobs: Logprobs | None, num_top: int | None) -> Logprobs | None:
    """Only the `num_top` likeliest that this request asked for."""
    if logprobs is None or num_top is None or len(logprobs.top) <= num_top:
        return logprobs
    return Logprobs(logprobs.token_id, logprobs.logprob, logprobs.top[:num_top])
