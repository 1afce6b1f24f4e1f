"""The official Python client, unmodified, for everything it asks of a server; and a plain curl."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI, pydantic_function_tool
from pydantic import BaseModel
from transformers import AutoTokenizer

from tests.e2e.test_serve import Running, start, stop
from tests.e2e.test_serve_chat import make_adapter
from tests.unit.serve.tool_templates import HERMES
from tunesmith.model.template import encode_prompt

QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


class City(Enum):
    PARIS = "Paris"
    ROME = "Rome"


class Weather(BaseModel):
    """The weather of a city."""

    city: City
    celsius: bool


class Verdict(BaseModel):
    good: bool
    city: City


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that knows tools."""
    made = tmp_path_factory.mktemp("tools") / "tiny-tools"
    shutil.copytree(tiny, made)
    (made / "chat_template.jinja").write_text(HERMES, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    running = start(folder, "--model-name", "tiny")
    yield running
    stop(running)


@pytest.fixture
def client(server: Running) -> OpenAI:
    return server.client()


# -- chat -------------------------------------------------------------------------------------------


def test_required_tools_are_called_with_arguments_of_their_schema(client: OpenAI) -> None:
    made = client.chat.completions.parse(
        model="tiny",
        messages=QUESTION,
        tools=[pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        seed=3,
        max_tokens=200,
    )
    [choice] = made.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


def test_a_named_tool_streams_its_call(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny",
        messages=QUESTION,
        tools=[pydantic_function_tool(Weather), pydantic_function_tool(Verdict)],
        tool_choice={"type": "function", "function": {"name": "Verdict"}},
        max_tokens=200,
        seed=4,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = [event.type for event in stream]
        made = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    [call] = made.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Verdict)
    assert made.usage is not None
    assert made.usage.completion_tokens > 5


def test_a_call_and_its_result_are_a_history(client: OpenAI, server: Running, folder: Path) -> None:
    tools: Any = [pydantic_function_tool(Weather)]
    asked = client.chat.completions.create(
        model="tiny", messages=QUESTION, tools=tools, tool_choice="required", max_tokens=200, seed=3
    )
    said = asked.choices[0].message
    assert said.tool_calls
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny"}
    history: Any = [*QUESTION, said.model_dump(), result]
    made = client.chat.completions.create(model="tiny", messages=history, tools=tools, max_tokens=5)
    ids = encode_prompt(AutoTokenizer.from_pretrained(folder), history, tools)
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(ids)
    told = server.post("/tokenize", {"messages": history, "tools": tools}).json()
    assert told["tokens"] == ids


def test_an_answer_is_parsed_into_a_model(client: OpenAI) -> None:
    made = client.chat.completions.parse(
        model="tiny", messages=QUESTION, response_format=Verdict, max_tokens=100, temperature=1.5, seed=1
    )
    assert isinstance(made.choices[0].message.parsed, Verdict)
    assert made.choices[0].finish_reason == "stop"


def test_a_json_object_and_a_choice(client: OpenAI) -> None:
    for number in range(3):
        made = client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            extra_body={"structured_outputs": {"choice": ["yes", "no", "maybe"]}},
            seed=number,
        )
        assert made.choices[0].message.content in ("yes", "no", "maybe")
    cut = client.chat.completions.create(
        model="tiny", messages=QUESTION, response_format={"type": "json_object"}, max_tokens=8, seed=1
    )
    assert (cut.choices[0].message.content or "").lstrip().startswith("{")


def test_an_async_stream_is_the_whole_answer(server: Running) -> None:
    options: Any = {"model": "tiny", "messages": QUESTION, "max_tokens": 20, "seed": 9, "logprobs": True}

    async def run() -> tuple[str, str | None]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=100) as client:
            whole = await client.chat.completions.create(**options)
            stream = await client.chat.completions.create(**options, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return text, whole.choices[0].message.content

    text, whole = asyncio.run(run())
    assert text == whole


# -- completions ------------------------------------------------------------------------------------


def test_the_tutorials_curl(server: Running) -> None:
    body = '{"model": "tiny", "prompt": "Once upon a time", "max_tokens": 41, "temperature": 0.5}'
    command = [
        "curl",
        "-sS",
        f"{server.url}/v1/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    made = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert made["object"] == "text_completion"
    assert made["usage"]["completion_tokens"] <= 41
    assert made["choices"][0]["finish_reason"] in ("stop", "length")


def test_best_of_is_the_likeliest_of_all(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": "Hello", "max_tokens": 6, "seed": 2, "logprobs": 0}

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    every = client.completions.create(**options, n=5).choices
    best = client.completions.create(**options, n=2, best_of=5).choices
    expected = sorted(every, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best] == [choice.text for choice in expected]


# -- vectors, models, responses ---------------------------------------------------------------------


def test_vectors_have_length_1_and_the_same_text_the_same_vector(client: OpenAI) -> None:
    made = client.embeddings.create(model="tiny", input=["a cat", "a dog", "a cat"])
    one, other, again = (entry.embedding for entry in made.data)
    assert math.hypot(*one) == pytest.approx(1.0, abs=1e-5)
    assert one == pytest.approx(again, abs=1e-5)
    assert one != pytest.approx(other, abs=1e-3)
    short = client.embeddings.create(model="tiny", input="a cat", dimensions=8, encoding_format="float")
    scale = math.hypot(*one[:8])
    assert short.data[0].embedding == pytest.approx([number / scale for number in one[:8]], abs=1e-5)


def test_models_say_what_they_are_made_of(client: OpenAI) -> None:
    [card] = client.models.list().data
    extra = card.model_extra or {}
    assert {"max_model_len", "run", "data_hash", "base", "base_revision", "template_hash"} <= set(extra)
    assert client.models.retrieve("tiny") == card


def test_responses_whole_and_streamed(client: OpenAI) -> None:
    options: Any = {"model": "tiny", "input": "Hello", "instructions": "Be short.", "max_output_tokens": 6}
    made = client.responses.create(**options, temperature=0)
    assert made.output_text
    assert made.usage is not None
    assert made.usage.output_tokens <= 6
    events = list(client.responses.create(**options, temperature=0, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete"
    assert text == made.output_text == events[-1].response.output_text
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**options, previous_response_id=made.id)
    assert error.value.code == "unsupported_parameter"


def test_responses_call_tools_and_are_parsed(client: OpenAI) -> None:
    tool: Any = {
        "type": "function",
        "name": "Weather",
        "parameters": openai.pydantic_function_tool(Weather)["function"]["parameters"],
        "strict": True,
    }
    made = client.responses.create(
        model="tiny", input="Rome?", tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    [call] = made.output
    assert call.type == "function_call"
    Weather.model_validate_json(call.arguments)
    history: Any = [
        {"role": "user", "content": "Rome?"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    again = client.responses.create(model="tiny", input=history, tools=[tool], max_output_tokens=4)
    assert again.output
    parsed = client.responses.parse(model="tiny", input="Good?", text_format=Verdict)
    assert isinstance(parsed.output_parsed, Verdict)


# -- adapters ---------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_answers_and_is_gone(server: Running, tiny: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny, tmp_path / "adapter", size=0.5)
    client, options = server.client(), {"prompt": "Hello", "max_tokens": 12, "temperature": 0}
    base = client.completions.create(model="tiny", **options).choices[0].text  # type: ignore[call-overload]
    made = server.post("/admin/adapters", {"name": "loud", "path": str(adapter)})
    assert made.status_code == 200, made.text
    assert made.json()["adapter"] == str(adapter)
    assert "loud" in [card.id for card in client.models.list().data]
    loud = client.completions.create(model="loud", **options)  # type: ignore[call-overload]
    assert (loud.model, loud.choices[0].text != base) == ("loud", True)
    assert client.completions.create(model="tiny", **options).choices[0].text == base  # type: ignore[call-overload]
    assert httpx.delete(f"{server.url}/admin/adapters/loud").status_code == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="loud", **options)  # type: ignore[call-overload]
    broken = tmp_path / "broken"
    broken.mkdir()
    answer = server.post("/admin/adapters", {"name": "broken", "path": str(broken)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_refused")
