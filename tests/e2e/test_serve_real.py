"""The real model behind a real server: its answers are those of transformers, alone and together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import AsyncOpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import warm
from tests.e2e.test_serve import QUESTION, Running, start, stop
from tests.greedy import greedy
from tunesmith.model.template import encode_prompt


@pytest.fixture(scope="module")
def real(smol: Path) -> Iterator[Running]:
    running = start(smol, "--model-name", "smol", env=warm.COLD)
    yield running
    stop(running)


@pytest.fixture(scope="module")
def reference(smol: Path) -> Any:
    """(model, tokenizer) as plain transformers loads them, in float32."""
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smol)


def test_greedy_chat_equals_transformers_generate(real: Running, reference: Any) -> None:
    tokenizer = reference[1]
    prompts = ["What is the capital of France?", "Count from one to ten.", "Write a haiku about rain 🌧."]
    for text in prompts:
        messages = [{"role": "user", "content": text}]
        answer = real.client().chat.completions.create(
            model="smol", messages=messages, max_tokens=40, temperature=0, logprobs=True
        )
        prompt = encode_prompt(tokenizer, messages)
        expected = greedy(reference[0], prompt, 40)
        assert answer.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
        entries = answer.choices[0].logprobs.content
        assert bytes(b for e in entries for b in e.bytes).decode() == answer.choices[0].message.content
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(expected)


def test_completions_of_token_ids_equal_transformers_generate(real: Running, reference: Any) -> None:
    tokenizer = reference[1]
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "def add(a, b):\n")]
    answer = real.client().completions.create(model="smol", prompt=prompts, max_tokens=30, temperature=0)
    expected = [tokenizer.decode(greedy(reference[0], p, 30), skip_special_tokens=True) for p in prompts]
    assert [choice.text for choice in answer.choices] == expected


def test_32_concurrent_answers_each_equal_the_single_one(real: Running) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": f"Tell me {number} facts about the number {number}."}],
            max_tokens=4 + number % 5,
            temperature=0 if number % 2 else 0.9,
            seed=number,
            stream=True,
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    async def everything() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=f"{real.url}/v1", api_key="none", timeout=500) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(32)))
            alone = [await ask(client, number) for number in range(32)]
        return together, alone

    together, alone = asyncio.run(everything())
    assert together == alone
    assert all(together)


def test_tokenize_gives_what_chat_feeds(real: Running, reference: Any) -> None:
    answer = real.post("/tokenize", {"model": "smol", "messages": QUESTION}).json()
    assert answer["tokens"] == encode_prompt(reference[1], QUESTION)
    assert answer["count"] == len(answer["tokens"])
    plain = real.post("/tokenize", {"prompt": "hello there"}).json()
    assert plain["tokens"] == reference[1]("hello there").input_ids
