"""Answers of the model in training to the recipe's sample prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunesmith.model.config import context_length
from tunesmith.model.generate import generate
from tunesmith.model.requests import SamplingParams
from tunesmith.model.template import encode_prompt, stop_token_ids
from tunesmith.recipe.schema import Recipe

Answers = list[dict[str, Any]]


def make_sampler(recipe: Recipe, tokenizer: Any, model: Any) -> Callable[[Any], Answers] | None:
    """A function from the model to one answer a prompt, as events; None when the recipe has no prompts."""
    settings = recipe.samples
    if not settings.prompts:
        return None
    prompts = [prompt_ids(tokenizer, recipe.data.system, text) for text in settings.prompts]
    params = SamplingParams(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=recipe.train.seed,
        stop_ids=stop_token_ids(tokenizer, getattr(model, "generation_config", None)),
    )
    limit = context_length(model.config)

    def sample(trained: Any) -> Answers:
        found = generate(trained, prompts, params, max_length=limit)
        return [
            {
                "prompt": text,
                "answer": tokenizer.decode(answer.ids, skip_special_tokens=True),
                "finish_reason": answer.finish_reason,
                "tokens": len(answer.ids),
            }
            for text, answer in zip(settings.prompts, found, strict=True)
        ]

    return sample


def prompt_ids(tokenizer: Any, system: str | None, text: str) -> list[int]:
    """The tokens of a sample prompt, up to where its answer begins."""
    if not tokenizer.chat_template:
        return list(tokenizer(text).input_ids)
    head = [{"role": "system", "content": system}] if system else []
    return encode_prompt(tokenizer, [*head, {"role": "user", "content": text}])
