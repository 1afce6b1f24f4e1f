"""Continuous batching: many requests advance together, one flat forward pass at a time.

A pass carries one token of every running request and a chunk of the prompts that wait, so a long prompt
delays the others by a chunk and no longer. Nothing is padded except inside decode attention (kv_cache).
No random state but each request's own is used: torch's generators stay as they were.

Shapes: T tokens of a pass, R rows that need logits, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tunesmith.core.errors import UserError
from tunesmith.model import attention
from tunesmith.model.fast_linear import fast_head
from tunesmith.model.kv_cache import CacheLayout, KVCache, Slot
from tunesmith.model.sampling import Logprobs, RowState, SamplingParams, logprobs_of, sample

FinishReason = Literal["stop", "length", "cancelled", "error"]
PREFILL_TOKENS = 256
LOGIT_ROWS = 128


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step did for one request.

    token_id: the new token, None when there is none (cancelled, failed, or max_new_tokens 0); a stop token
    is reported here too. finish_reason: set on the request's last event; "error" when its logits were not
    finite. prompt_logprobs: on the first event, for the prompt's tokens but the first.
    """

    request_id: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] | None = None


@dataclass(slots=True)
class Generation:
    """A finished answer. `ids` is without the stop token, which is `stop_id` where one ended the answer."""

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    stop_id: int | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: tuple[Logprobs, ...] | None = None


@dataclass(eq=False, slots=True)
class _Request:
    id: int
    prompt: list[int]
    params: SamplingParams
    row: RowState
    slot: Slot | None = None
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)

    @property
    def place(self) -> Slot:
        assert self.slot is not None
        return self.slot


class Generator:
    """The synchronous core: `add` requests, call `step` until there is no work.

    model: a causal language model (or PeftModel) in eval mode. max_length: most tokens of a prompt and its
    answer together; an answer that reaches it ends with "length". max_concurrent: requests computed
    together; the others wait in line.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_length: int | None = None,
        max_concurrent: int = 16,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self.max_length = max_length or _context_length(model)
        attention.install(model, max_length=self.max_length)
        self.model = model
        self.max_concurrent = max_concurrent
        self.prefill_tokens = prefill_tokens
        weight = _head_weight(model)
        self._vocab_size, self._dtype, self._device = int(weight.shape[0]), weight.dtype, weight.device
        with torch.inference_mode():
            self._head = fast_head(attention.lm_head(model))
        self._cache = KVCache(self.max_length)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._cancelled: set[int] = set()
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise UserError when this prompt cannot be continued in this way at all."""
        if not prompt:
            raise UserError("the prompt has no tokens", hint="give at least one")
        if len(prompt) > self.max_length:
            raise UserError(f"the prompt has {len(prompt)} tokens, the context {self.max_length}")
        for what, tokens in (("the prompt", prompt), ("logit_bias", params.logit_bias)):
            bad = next((token for token in tokens if not 0 <= token < self._vocab_size), None)
            if bad is not None:
                raise UserError(f"{what}: token {bad} is not in the vocabulary of {self._vocab_size} tokens")

    def add(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Put a request in line; the number that its events carry. Raises UserError as `check` does."""
        self.check(prompt, params)
        request = _Request(self._next_id, list(prompt), params, RowState(params))
        self._next_id += 1
        self._waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request at the next step, where its last event says "cancelled". Unknown ids are ignored."""
        self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One forward pass: at most one new token for every running request."""
        events = self._drop_cancelled()
        self._admit()
        chunks = self._schedule()
        if chunks:
            hidden = self._forward(chunks)
            events += self._advance(chunks, hidden)
        return events

    def _drop_cancelled(self) -> list[TokenEvent]:
        if not self._cancelled:
            return []
        gone = [r for r in (*self._running, *self._waiting) if r.id in self._cancelled]
        self._cancelled.clear()
        for request in gone:
            self._remove(request)
        return [TokenEvent(request.id, None, "cancelled") for request in gone]

    def _remove(self, request: _Request, *, wipe: bool = False) -> None:
        if request.slot is None:
            self._waiting.remove(request)
            return
        self._running.remove(request)
        self._cache.close(request.slot, wipe=wipe)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_concurrent:
            request = self._waiting.popleft()
            request.slot = self._cache.open(len(request.prompt))
            self._running.append(request)

    def _schedule(self) -> list[tuple[_Request, int]]:
        """The requests of the next pass and how many tokens each brings: then prompt chunks."""
        decoding = [r for r in self._running if r.output]
        for request in decoding:
            self._cache.reserve(request.place, request.place.length + 1)
        decoding.sort(key=lambda r: (r.place.pool.size, r.place.index))
        chunks = [(request, 1) for request in decoding]
        budget = self.prefill_tokens
        for request in self._running:
            left = len(request.prompt) - request.place.length
            if left > 0 and budget > 0:
                chunks.append((request, min(left, budget)))
                budget -= min(left, budget)
        return chunks

    def _forward(self, chunks: list[tuple[_Request, int]]) -> Tensor:
        """Final hidden states [T, D] of the pass."""
        ids: list[int] = []
        for request, count in chunks:
            start = request.place.length
            ids += request.output[-1:] if request.output else request.prompt[start : start + count]
        layout = CacheLayout([(r.place, n) for r, n in chunks], dtype=self._dtype, device=self._device)
        input_ids = torch.tensor(ids, device=self._device)[None]
        hidden = attention.hidden_states(self.model, input_ids, layout.positions[None], layout)[0]
        layout.advance()
        return hidden

    def _advance(self, chunks: list[tuple[_Request, int]], hidden: Tensor) -> list[TokenEvent]:
        """Sample where a sequence's last token has been computed; the events of the step."""
        ready: list[_Request] = []
        last_rows: list[int] = []
        end = 0
        for request, count in chunks:
            end += count
            if request.params.prompt_logprobs is not None and not request.output:
                self._add_prompt_logprobs(request, count, hidden[end - count : end])
            if request.place.length >= len(request.prompt):
                ready.append(request)
                last_rows.append(end - 1)
        if not ready:
            return []
        if len(last_rows) != end:
            hidden = hidden[torch.tensor(last_rows, device=hidden.device)]
        return self._sample(ready, self._head(hidden))

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
        params, first = request.params, not request.output
        prompt = tuple(request.prompt_logprobs) if first and params.prompt_logprobs is not None else None
        reason: FinishReason | None = None
        new: int | None = token
        if token < 0:
            reason, new, logprobs = "error", None, None
        elif params.max_new_tokens == 0:
            reason, new, logprobs = "length", None, None
        else:
            request.output.append(token)
            request.row.count(token)
            if token in params.stop_ids:
                reason = "stop"
            elif len(request.output) >= params.max_new_tokens or self._is_full(request):
                reason = "length"
        if reason is not None:
            self._remove(request, wipe=reason == "error")
        return TokenEvent(request.id, new, reason, _cut(logprobs, params.logprobs), prompt)

    def _is_full(self, request: _Request) -> bool:
        return len(request.prompt) + len(request.output) >= self.max_length

    def _add_prompt_logprobs(self, request: _Request, count: int, hidden: Tensor) -> None:
        """`hidden` [count, D] are the hidden states of the request's newest tokens."""
        done = request.place.length
        targets = request.prompt[done - count + 1 : done + 1]
        for at in range(0, len(targets), LOGIT_ROWS):
            piece = targets[at : at + LOGIT_ROWS]
            logits = self._head(hidden[at : at + len(piece)])
            request.prompt_logprobs += logprobs_of(logits, piece, request.params.prompt_logprobs or 0)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    max_concurrent: int = 16,
    max_length: int | None = None,
) -> list[Generation]:
    """Continue every prompt (token ids); answers in the order of the prompts.

    params: one for all, or one for each prompt. The model may be in training: it is put into eval mode
    and every module's mode is restored; torch's random state is not touched. Raises UserError for a prompt
    that is empty or longer than the context.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    answers = [Generation() for _ in prompts]
    with evaluating(model):
        generator = Generator(model, max_concurrent=max_concurrent, max_length=max_length)
        index = {generator.add(p, s): i for i, (p, s) in enumerate(zip(prompts, each, strict=True))}
        while generator.has_work:
            for event in generator.step():
                i = index[event.request_id]
                _record(answers[i], event, each[i].stop_ids)
    return answers


def _record(answer: Generation, event: TokenEvent, stop_ids: tuple[int, ...]) -> None:
    if event.prompt_logprobs is not None:
        answer.prompt_logprobs = event.prompt_logprobs
    if event.finish_reason is not None:
        answer.finish_reason = event.finish_reason
    if event.token_id is None:
        return
    if event.token_id in stop_ids:
        answer.stop_id = event.token_id
        return
    answer.ids.append(event.token_id)
    if event.logprobs is not None:
        answer.logprobs.append(event.logprobs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode it was in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def check_logits(model: nn.Module, ids: Sequence[int]) -> None:
    """Compare this module's logits for `ids` with the model's own forward pass.

    Raises UserError when they differ: the model changes its hidden states or logits in a way (scaling,
    soft caps) that this generator does not know.
    """
    with torch.inference_mode(), evaluating(model):
        attention.install(model, max_length=len(ids))
        head, weight = attention.lm_head(model), _head_weight(model)
        slot = KVCache(len(ids)).open(len(ids))
        layout = CacheLayout([(slot, len(ids))], dtype=weight.dtype, device=weight.device)
        input_ids = torch.tensor(list(ids), device=weight.device)[None]
        ours = head(attention.hidden_states(model, input_ids, layout.positions[None], layout))[0].float()
        theirs = model(input_ids=input_ids, use_cache=False).logits[0].float()
    bound = 0.001 if weight.dtype == torch.float32 else 0.1
    gap = float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
    if not gap <= bound:
        name = type(model).__name__
        raise UserError(
            f"{name}: generated logits differ from the model's own by {gap:.3g} (bound {bound:g})",
            hint="this architecture changes its logits in a way that is not supported here",
        )


def _head_weight(model: nn.Module) -> Tensor:
    weight: Tensor = cast(Any, attention.lm_head(model)).weight
    return weight


def _context_length(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().max_position_embeddings)


def _cut(logprobs: Logprobs | None, num_top: int | None) -> Logprobs | None:
    """Only the `num_top` likeliest that this request asked for."""
    if logprobs is None or num_top is None or len(logprobs.top) <= num_top:
        return logprobs
    return Logprobs(logprobs.token_id, logprobs.logprob, logprobs.top[:num_top])
