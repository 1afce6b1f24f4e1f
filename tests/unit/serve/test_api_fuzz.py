"""Malformed requests, thousands of them, against the real engine: never a 5xx, never an answer that hangs."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.unit.model.chat_templates import CHATML_TOOLS
from tests.unit.serve.replay import opened
from tunesmith.model.generate import Generator
from tunesmith.model.grammar import Grammars
from tunesmith.model.load import load_model
from tunesmith.serve.api import create_app
from tunesmith.serve.gateway import Gateway, OpenedAdapter
from tunesmith.serve.jobs import ServedModel
from tunesmith.serve.local_engine import LocalEngine

LENGTH = 96
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
FUNCTION = {"name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
SHORT = {"max_tokens": 2, "temperature": 0.5}
GOOD: list[tuple[str, str, Any]] = [
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "stop": ["x"], "logprobs": 1, "seed": 1} | SHORT),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": [[5, 6], [7]], "echo": True, "n": 2, "best_of": 3} | SHORT),
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "u"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "1", "tool_call_id": "c1"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "auto",
            "logprobs": True,
            "top_logprobs": 2,
            "logit_bias": {"5": 1.5},
        }
        | SHORT,
    ),
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "u"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            "stream": True,
            "stream_options": {"include_usage": True},
            "presence_penalty": 1,
            "repetition_penalty": 1.1,
        }
        | SHORT,
    ),
    (
        "POST",
        "/v1/responses",
        {
            "model": "tiny",
            "input": [{"role": "user", "content": "u"}],
            "instructions": "i",
            "max_output_tokens": 2,
            "tools": [FUNCTION | {"type": "function"}],
            "text": {"format": {"type": "text"}},
            "metadata": {"a": "b"},
        },
    ),
    ("POST", "/v1/embeddings", {"model": "tiny", "input": ["a", "b"], "dimensions": 8, "encoding_format": "float"}),
    ("POST", "/tokenize", {"model": "tiny", "messages": [{"role": "user", "content": "u"}]}),
    ("POST", "/tokenize", {"prompt": "a", "return_token_strs": True, "add_special_tokens": False}),
    ("POST", "/detokenize", {"tokens": [5, 6, 7]}),
    ("POST", "/admin/adapters", {"name": "x", "path": "y"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}),
    ("DELETE", "/admin/adapters/x", None),
    ("GET", "/v1/models/tiny", None),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 1e-320, "", " ", "a", "tiny",
    "null", "5", "\0", "\x1b[0m", "\ufffe", "\U000f0000", "🙂" * 50, "<|im_end|>", "<tool_call>", "x" * 5000,
    "{{ 7 * 7 }}", "{% for x in y %}", "../../etc/passwd", "\u202e", "e\u0301", [], [[]], [[[]]], [None], ["a", 1],
    [5, "a"], [0] * 200, {}, {"a": {}}, {"type": "text"}, {"type": "function"}, {"$ref": "#"}, {"type": ["string"]},
    {"": ""}, {"__proto__": 1}, {"role": "user", "content": "a"}, [{"role": "user"}], [{}], {"5": 1},
    {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"pattern": "(("}, {"enum": []}, {"minItems": 10**9},
]  # fmt: skip
TYPES = ["application/json"] * 30 + [
    "text/plain",
    "",
    "application/json; charset=latin-1",
    "a/b;;=",
    "multipart/form-data",
]


@dataclass
class Request:
    method: str
    path: str
    content: bytes
    kind: str


class Fuzz:
    """Requests that were good until something was done to them."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def request(self) -> Request:
        draw = self._draw
        method, path, body = copy.deepcopy(draw.choice(GOOD))
        for _ in range(draw.randint(1, 3)):
            body = self._changed(body)
        content = b"" if body is None else json.dumps(body).encode()
        if draw.random() < 0.2:
            content = self._broken(content)
        if draw.random() < 0.05:
            method = draw.choice(["GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"])
        if draw.random() < 0.05:
            path += draw.choice(["/", "//", "?a=b", "%00", "%ff", "/..", "x" * 300])
        return Request(method, path, content, draw.choice(TYPES))

    def _changed(self, value: Any) -> Any:
        """The value with one thing in it, at any depth, replaced, taken away or added."""
        draw = self._draw
        if isinstance(value, dict) and value and draw.random() < 0.95:
            key = draw.choice(list(value))
            deed = draw.random()
            if deed < 0.12:
                del value[key]
            elif deed < 0.2:
                value[
                    draw.choice(["extra", "", "stream", "n", "echo", "tools", "messages", "prompt", "strict"])
                ] = self._odd()
            else:
                value[key] = self._changed(value[key]) if draw.random() < 0.6 else self._odd()
            return value
        if isinstance(value, list) and value and draw.random() < 0.7:
            place = draw.randrange(len(value))
            value[place] = self._changed(value[place])
            return value
        return self._odd()

    def _odd(self) -> Any:
        return copy.deepcopy(self._draw.choice(ODD))

    def _broken(self, content: bytes) -> bytes:
        draw, raw = self._draw, bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.randint(0, len(raw))
            deed = draw.randrange(5)
            if deed == 0:
                del raw[at : at + draw.randint(1, 20)]
            elif deed == 1:
                raw[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 4)))
            elif deed == 2:
                raw[at:at] = draw.choice(
                    [b"NaN", b"1e999", b"\\ud800", b"\\u0000", b"9" * 5000, b"[" * 3000, b"//"]
                )
            elif deed == 3:
                raw[at:at] = raw[: draw.randint(0, 40)]
            else:
                raw[:] = raw[at:] + raw[:at]
        return bytes(raw)


@asynccontextmanager
async def served(smol: Path, tiny: Path) -> AsyncIterator[tuple[httpx.AsyncClient, LocalEngine]]:
    tokenizer = opened(smol, CHATML_TOOLS)
    model = load_model(tiny, dtype=torch.float32, device="cpu")
    grammars = Grammars(tokenizer, 49152, (2,))
    engine = LocalEngine(Generator(model, max_length=LENGTH, max_concurrent=8, grammars=grammars))
    engine.start([5, 6])
    card = ServedModel("tiny", tokenizer, LENGTH, (2,), 1)
    app = create_app(Gateway(engine, {"tiny": card}, lambda name, path: OpenedAdapter(card, Path(path))))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=None) as client:
        yield client, engine
    await asyncio.to_thread(engine.close, grace_s=0)


async def send(client: httpx.AsyncClient, request: Request) -> httpx.Response:
    headers = {"content-type": request.kind} if request.kind else {}
    return await client.request(request.method, request.path, content=request.content, headers=headers)


def check(request: Request, answer: httpx.Response) -> None:
    assert answer.status_code < 500, (request, answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, request
        assert isinstance(error["message"], str)
        assert 0 < len(error["message"]) <= 1000, request
        assert len(error["param"] or "") <= 200, request
    elif answer.headers.get("content-type", "").startswith("text/event-stream"):
        assert answer.text.endswith("\n\n")
        assert '"server_error"' not in answer.text, (request, answer.text)


@pytest.mark.parametrize("seed", range(3))
def test_no_malformed_request_is_the_servers_fault(smol: Path, tiny: Path, seed: int) -> None:
    async def run() -> Counter[int]:
        fuzz, seen = Fuzz(seed), Counter[int]()
        async with served(smol, tiny) as (client, engine):
            for _ in range(70):
                batch = [fuzz.request() for _ in range(16)]
                answers = await asyncio.wait_for(asyncio.gather(*(send(client, r) for r in batch)), 120)
                for request, answer in zip(batch, answers, strict=True):
                    check(request, answer)
                    seen[answer.status_code] += 1
            end = time.monotonic() + 10
            while engine.status().running and time.monotonic() < end:
                await asyncio.sleep(0.01)
            assert engine.status().alive
            assert (engine.status().running, engine.status().waiting) == (0, 0)
        return seen

    seen = asyncio.run(run())
    # Both kinds were met: what is refused, and what is odd but good.
    assert seen[400] > 300
    assert seen[200] > 100
