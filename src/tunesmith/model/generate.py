"""Answers to a list of prompts at once, and what else asks a model for logits as the generator does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from tunesmith.core.errors import UserError
from tunesmith.model import attention
from tunesmith.model.fast_decode import make_forward
from tunesmith.model.generator import Generator, computed_in, context_length, new_cache
from tunesmith.model.kv_cache import CacheLayout, Chunk, default_cache_tokens
from tunesmith.model.pages import PAGE, pages_for
from tunesmith.model.requests import FinishReason, Logprobs, SamplingParams, TokenEvent

__all__ = [
    "FinishReason",
    "Generation",
    "Generator",
    "TokenEvent",
    "check_logits",
    "evaluating",
    "generate",
]


@dataclass(slots=True)
class Generation:
    """A finished answer. `ids` is without the stop token, which is `stop_id` where one ended the answer."""

    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "length"
    stop_id: int | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: tuple[Logprobs, ...] | None = None


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
        generator = Generator(
            model,
            max_concurrent=max_concurrent,
            max_length=max_length,
            cache_tokens=_wanted_cache(model, prompts, each, max_concurrent, max_length),
        )
        index = {generator.add(p, s): i for i, (p, s) in enumerate(zip(prompts, each, strict=True))}
        while generator.has_work:
            for event in generator.step():
                i = index[event.request_id]
                _record(answers[i], event, each[i].stop_ids)
    return answers


def _wanted_cache(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    max_concurrent: int,
    max_length: int | None,
) -> int:
    """Tokens of the longest answers that may run together, unless that is much."""
    limit = max_length or context_length(model)
    sizes = [min(len(p) + s.max_new_tokens, limit) for p, s in zip(prompts, params, strict=True)]
    longest = [pages_for(size) * PAGE for size in sorted(sizes, reverse=True)[:max_concurrent]]
    return default_cache_tokens(model, computed_in(model)[0], sum(longest), max(longest, default=PAGE))


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
        head, (dtype, device) = attention.lm_head(model), computed_in(model)
        cache = new_cache(pages_for(len(ids)), dtype, device)
        chunk = Chunk(range(1, cache.num_pages + 1), 0, len(ids))
        layout = CacheLayout(cache, [chunk], dtype=dtype, device=device)
        input_ids = torch.tensor(list(ids), device=device)[None]
        ours = head(make_forward(model)(input_ids, layout.positions[None], layout))[0].float()
        theirs = model(input_ids=input_ids, use_cache=False).logits[0].float()
    bound = 0.001 if dtype == torch.float32 else 0.1
    gap = float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
    if not gap <= bound:
        name = type(model).__name__
        raise UserError(
            f"{name}: generated logits differ from the model's own by {gap:.3g} (bound {bound:g})",
            hint="this architecture changes its logits in a way that is not supported here",
        )
