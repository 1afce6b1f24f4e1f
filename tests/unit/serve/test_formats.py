"""What an answer must look like beside tools that it may call: never anything but one of the two."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.unit.serve.served import served
from tests.unit.serve.tool_templates import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS

SUM = {
    "type": "object",
    "properties": {"sum": {"enum": [1, 22, 333]}},
    "required": ["sum"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
SHOWN = "{% if tools %}{{ tools | tojson }}{% endif %}"
"""Before a template that has no place for tools."""
ANSWERS = 20
BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "1 + 1?"}],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": ADD, "strict": True}}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": SUM}},
    "n": ANSWERS,
    "seed": 3,
    "max_tokens": 250,
}


def kind_of(choice: dict[str, Any], *, parallel: bool) -> str:
    """How a choice ended, which is checked."""
    message = choice["message"]
    if choice["finish_reason"] == "stop":
        jsonschema.validate(json.loads(message["content"]), SUM)
        assert "tool_calls" not in message
    elif choice["finish_reason"] == "tool_calls":
        assert message["content"] is None
        assert parallel or len(message["tool_calls"]) == 1
        for call in message["tool_calls"]:
            assert call["function"]["name"] == "add"
            jsonschema.validate(json.loads(call["function"]["arguments"]), ADD)
    return str(choice["finish_reason"])


@pytest.mark.parametrize("template", [HERMES, SHOWN + LLAMA3, SHOWN + MISTRAL, SHOWN + MISTRAL_ARGS])
def test_an_answer_is_a_call_or_keeps_to_its_format(smol: Path, tiny: Path, template: str) -> None:
    async def run() -> Counter[str]:
        seen = Counter[str]()
        async with served(smol, tiny, length=512, template=template) as (client, _):
            for parallel in (True, False):
                body = BODY | {"parallel_tool_calls": parallel}
                answer = await client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 200, answer.text
                seen += Counter(kind_of(choice, parallel=parallel) for choice in answer.json()["choices"])
        return seen

    seen = asyncio.run(run())
    # A model that draws at random may add calls until the answer is full.
    assert min(seen["stop"], seen["tool_calls"]) > 4 > seen["length"], seen
    assert seen.total() == 2 * ANSWERS
