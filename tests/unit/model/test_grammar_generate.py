"""Grammars in the generator: real models, in one batch with requests that have none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.core.errors import UserError
from tunesmith.model.generator import Generator
from tunesmith.model.grammar import Grammars, GrammarSpec
from tunesmith.model.requests import SamplingParams

EOS = 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "é", "🙂"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tiny_parts(tiny: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny)


Answer = tuple[list[int], str | None]


def answers(
    model: Any, tokenizer: Any, asked: Sequence[tuple[str, SamplingParams]], *, together: int = 16
) -> list[Answer]:
    """(ids without the stop token, finish_reason) of every prompt."""
    grammars = Grammars(tokenizer, model.config.vocab_size, (EOS,))
    generator = Generator(model, max_concurrent=together, grammars=grammars)
    requests = [generator.add(tokenizer(prompt).input_ids, params) for prompt, params in asked]
    ids: dict[int, list[int]] = {request: [] for request in requests}
    ends: dict[int, str | None] = {}
    while generator.has_work:
        for event in generator.step():
            if event.token_id not in (None, EOS):
                ids[event.request_id].append(event.token_id)
            if event.finish_reason:
                ends[event.request_id] = event.finish_reason
    return [(ids[request], ends[request]) for request in requests]


def with_schema(**more: Any) -> SamplingParams:
    settings = {"max_new_tokens": 200, "stop_ids": (EOS,), "grammar": GrammarSpec.schema(SCHEMA)}
    return SamplingParams(**(settings | more))


def test_answers_of_a_random_model_are_valid(tiny_parts: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_parts
    asked = [("A person:", with_schema(temperature=1.0, seed=seed)) for seed in range(8)]
    done = [ids for ids, reason in answers(model, tokenizer, asked) if reason == "stop"]
    assert len(done) >= 4
    for ids in done:
        jsonschema.validate(json.loads(tokenizer.decode(ids)), SCHEMA)


def test_mixed_in_one_batch_every_answer_is_as_alone(tiny_parts: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_parts
    free = SamplingParams(max_new_tokens=24)
    asked = [
        ("Once upon a time", free),
        ("A person:", with_schema(max_new_tokens=60)),
        ("Numbers", SamplingParams(max_new_tokens=24, temperature=1.0, seed=3, top_p=0.9)),
        ("Yes or no?", with_schema(grammar=GrammarSpec.one_of(["yes", "no"]))),
        ("Digits:", with_schema(grammar=GrammarSpec("regex", "[0-9]{4,6}"), temperature=1.0, seed=1)),
        ("The end", free),
    ]
    mixed = answers(model, tokenizer, asked)
    assert mixed == answers(model, tokenizer, asked, together=1)
    assert tokenizer.decode(mixed[3][0]) in ("yes", "no")
    assert tokenizer.decode(mixed[4][0]).isdigit()
    assert [reason for _, reason in mixed[3:5]] == ["stop", "stop"]


def test_ignoring_the_stop_token_ends_with_the_grammar(tiny_parts: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_parts
    asked = [("Digits:", with_schema(grammar=GrammarSpec("regex", "[0-9]{2,5}"), stop_ids=()))]
    [(ids, reason)] = answers(model, tokenizer, asked)
    assert len(tokenizer.decode(ids)) == 5
    assert reason == "stop"


def test_log_probabilities_are_the_models_own(tiny_parts: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_parts
    generator = Generator(model, grammars=Grammars(tokenizer, model.config.vocab_size, (EOS,)))
    prompt = tokenizer("Digits:").input_ids
    generator.add(prompt, with_schema(grammar=GrammarSpec("regex", "[0-9]"), logprobs=3))
    [event] = [event for _ in range(3) for event in generator.step() if event.token_id is not None][:1]
    with torch.inference_mode():
        own = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    assert event.logprobs is not None
    assert event.token_id is not None
    assert event.logprobs.logprob == pytest.approx(float(own[event.token_id]), abs=1e-4)
    assert [token for token, _ in event.logprobs.top] == own.topk(3).indices.tolist()


def test_a_trained_model_fills_in_a_schema(smol: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smol)
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 20}, "in_europe": {"type": "boolean"}},
        "required": ["capital", "in_europe"],
        "additionalProperties": False,
    }
    prompt = (
        "<|im_start|>user\nWhat is the capital of France? Answer as JSON.<|im_end|>\n<|im_start|>assistant\n"
    )
    params = with_schema(grammar=GrammarSpec.schema(schema), max_new_tokens=60)
    [(ids, reason)] = answers(model, tokenizer, [(prompt, params)])
    assert reason == "stop"
    assert json.loads(tokenizer.decode(ids))["capital"] == "Paris"


def test_a_bad_grammar_is_refused_before_anything_runs(tiny_parts: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_parts
    generator = Generator(model, grammars=Grammars(tokenizer, model.config.vocab_size, (EOS,)))
    with pytest.raises(UserError, match="Invalid type"):
        generator.add([5], with_schema(grammar=GrammarSpec("json_schema", '{"type": "strin"}')))
    with pytest.raises(UserError, match="no tokenizer"):
        Generator(model).add([5], with_schema())
    assert not generator.has_work
