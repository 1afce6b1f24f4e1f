"""What a request is told of the tokens that it took."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from tests.unit.serve.replay import opened
from tests.unit.serve.served import served
from tunesmith.model.requests import TokenEvent
from tunesmith.serve.jobs import Job
from tunesmith.serve.text import Answer, Detokenizer

# Longer than two pages of the cache, which keeps whole pages and computes a prompt's last token anew.
TEXT = "one two three four five six seven eight nine ten " * 5
ENDS = {"max_tokens": 3, "temperature": 0}


def test_a_prompt_that_was_answered_before_is_told_to_be_cached(smol: Path, tiny: Path) -> None:
    def messages(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": TEXT + text}]

    async def usage(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
        answer = await client.post(path, json={"model": "tiny"} | body)
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            return answer.json()["usage"]
        last = answer.text.split("\n\n")[-3 if "stream_options" in body else -2]
        found = json.loads(last.partition("data: ")[2])
        return found["usage"] if "usage" in found else found["response"]["usage"]

    async def run() -> None:
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        async with served(smol, tiny, length=256) as (client, _):
            plain = "/v1/completions"
            first = await usage(client, plain, {"prompt": TEXT, "n": 3} | ENDS)
            assert first["prompt_tokens_details"] == {"cached_tokens": 0}
            for more in ({}, {"n": 3}, {"n": 2, "best_of": 4}, {"prompt": TEXT + " and more"}, streamed):
                again = await usage(client, plain, {"prompt": TEXT} | ENDS | more)
                assert 32 <= again["prompt_tokens_details"]["cached_tokens"] < again["prompt_tokens"]
            two = await usage(client, plain, {"prompt": [TEXT, "Never before."]} | ENDS)
            assert two["prompt_tokens_details"] == first["prompt_tokens_details"] | {
                "cached_tokens": again["prompt_tokens_details"]["cached_tokens"]
            }
            new = await usage(client, "/v1/chat/completions", {"messages": messages("?")} | ENDS)
            assert new["prompt_tokens_details"] == {"cached_tokens": 0}
            for more in ({}, streamed):
                body = {"messages": messages("?")} | ENDS | more
                again = await usage(client, "/v1/chat/completions", body)
                assert again["prompt_tokens_details"]["cached_tokens"] >= 32
            for more in ({}, {"stream": True}):
                body = {"input": messages("!"), "max_output_tokens": 3} | more
                again = await usage(client, "/v1/responses", body)
                assert again["input_tokens_details"]["cached_tokens"] >= 32

    asyncio.run(run())


def test_of_several_answers_to_a_prompt_the_least_cached_counts(smol: Path) -> None:
    """The first had the prompt computed; that the others found it then is nothing saved of the request."""
    detokenizer = Detokenizer(opened(smol, None))
    answers = [Answer(detokenizer) for _ in range(4)]
    job = Job([], answers, prompt_tokens=100, n=2)
    for answer, cached in zip(answers, (0, 48, 64, 32), strict=True):
        answer.push(TokenEvent(0, 5, cached_tokens=cached))
        answer.push(TokenEvent(0, 6, "length"))
    assert job.usage() == {
        "prompt_tokens": 100,
        "completion_tokens": 8,
        "total_tokens": 108,
        "prompt_tokens_details": {"cached_tokens": 32},
    }
