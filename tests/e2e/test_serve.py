"""A real server process, asked through the official openai client."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import warm

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    model: str
    facts: dict[str, Any]

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=300)

    def post(self, path: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, (str, bytes)) else json.dumps(body)
        headers = {"content-type": "application/json"}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=120)

    def ready(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/ready").json()


def start(*args: str | Path, env: dict[str, str] | None = None) -> Running:
    pipe = subprocess.PIPE
    process = warm.start("serve", *args, "--port", "0", "--json", env=env, stdout=pipe, stderr=pipe)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    facts = json.loads(line)
    return Running(process, facts["url"], facts["model"], facts)


def stop(running: Running, number: int = signal.SIGTERM) -> tuple[int, str]:
    running.process.send_signal(number)
    _, errors = running.process.communicate(timeout=30)
    return running.process.returncode, errors


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[Running]:
    running = start(tiny, "--model-name", "tiny")
    yield running
    stop(running)


def test_models(small: Running, tiny: Path) -> None:
    [card] = small.client().models.list().data
    assert (card.id, card.object, card.base, card.adapter) == ("tiny", "model", str(tiny), None)
    assert small.client().models.retrieve("tiny").max_model_len == 1024
    with pytest.raises(openai.NotFoundError) as error:
        small.client().models.retrieve("other")
    assert error.value.code == "model_not_found"


def test_a_prompt_that_was_answered_before_comes_from_the_cache(small: Running) -> None:
    def cached() -> int:
        answer = small.client().completions.create(model="tiny", prompt="Never asked. " * 30, max_tokens=2)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached() == 0
    assert cached() > 50


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_streamed_equals_whole(small: Running, temperature: float) -> None:
    options: Any = {"model": "tiny", "max_tokens": 25, "temperature": temperature, "seed": 11, "n": 2}
    chat, plain = small.client().chat.completions, small.client().completions
    whole = chat.create(messages=QUESTION, **options)
    usage_on = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat.create(messages=QUESTION, **options, **usage_on))
    assert chunks[-1].choices == []
    # What the first had computed is in the cache for the second.
    counts = {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert chunks[-1].usage.model_dump(include=counts) == whole.usage.model_dump(include=counts)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == whole.choices[index].message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [whole.choices[index].finish_reason]
    assert whole.usage.completion_tokens <= 50
    text = plain.create(prompt="abc", **options).choices[1].text
    parts = [c.choices[0] for c in plain.create(prompt="abc", stream=True, **options)]
    assert "".join(c.text for c in parts if c.index == 1) == text


def test_a_seed_gives_the_same_answer_whatever_else_runs(small: Running) -> None:
    def ask(seed: int) -> str:
        made = small.client().completions.create(model="tiny", prompt="Hello", max_tokens=30, seed=seed)
        return made.choices[0].text

    alone = ask(1)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [1, 2, 3, 1, 4, 5, 6, 1]))
    assert [together[0], together[3], together[7]] == [alone] * 3
    assert len(set(together)) == 6
    unseeded = {
        small.client().completions.create(model="tiny", prompt="Hello", max_tokens=30).choices[0].text
        for _ in range(3)
    }
    assert len(unseeded) == 3


def test_n_choices_differ_and_the_first_is_the_single_one(small: Running) -> None:
    create = small.client().completions.create
    many = create(model="tiny", prompt=["a", "b"], n=3, seed=5, max_tokens=20, logprobs=0)
    assert [choice.index for choice in many.choices] == list(range(6))
    assert len({choice.text for choice in many.choices}) == 6
    assert create(model="tiny", prompt="b", seed=5, max_tokens=20).choices[0].text == many.choices[3].text


def test_stop_strings_end_the_answer_and_never_show(small: Running) -> None:
    create = small.client().completions.create
    whole = create(model="tiny", prompt="Hello", max_tokens=40, temperature=0).choices[0].text
    stop = whole[12:19]
    expected = whole[: whole.index(stop)]
    options: Any = {"model": "tiny", "prompt": "Hello", "max_tokens": 40, "temperature": 0}
    answer = create(**options, stop=["never ever", stop])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    assert answer.usage.completion_tokens < 40
    streamed = "".join(chunk.choices[0].text for chunk in create(**options, stop=stop, stream=True))
    assert streamed == expected


def test_logprobs_and_echo(small: Running, tiny: Path) -> None:
    create = small.client().completions.create
    answer = create(model="tiny", prompt="Hello there", max_tokens=3, temperature=0, logprobs=2, echo=True)
    [choice] = answer.choices
    found = choice.logprobs
    ids = AutoTokenizer.from_pretrained(tiny)("Hello there").input_ids
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.inference_mode():
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert choice.text.startswith("Hello there")
    assert "".join(found.tokens) == choice.text
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1] == pytest.approx(table[0, ids[1]].item(), abs=1e-4)
    assert found.token_logprobs[len(ids)] == pytest.approx(table[-1].max().item(), abs=1e-4)
    assert [choice.text[o:].startswith(t) for o, t in zip(found.text_offset, found.tokens, strict=True)]
    assert all(len(top) == 2 for top in found.top_logprobs[len(ids) :])
    streamed = list(
        create(
            model="tiny",
            prompt="Hello there",
            max_tokens=3,
            temperature=0,
            logprobs=2,
            echo=True,
            stream=True,
        )
    )
    assert "".join(c.choices[0].text for c in streamed) == choice.text
    tokens = [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert tokens == found.tokens
    scored = create(model="tiny", prompt="Hello there", max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].text == "Hello there"
    assert scored.usage.completion_tokens == 0


def test_chat_logprobs(small: Running) -> None:
    answer = small.client().chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 4
    for entry in entries:
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert len(entry.top_logprobs) == 3


def test_logit_bias_and_penalties(small: Running, tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    [token] = tokenizer(" yes").input_ids
    options: Any = {"model": "tiny", "prompt": "Hello", "max_tokens": 5, "temperature": 0}
    create = small.client().completions.create
    assert create(**options, logit_bias={str(token): 100}).choices[0].text == " yes" * 5
    text = (
        create(**options, logit_bias={str(token): 100}, presence_penalty=2, frequency_penalty=2)
        .choices[0]
        .text
    )
    assert text == " yes" * 5
    options["max_tokens"] = 60
    plain = create(**options, logprobs=0).choices[0].logprobs.tokens
    punished = (
        create(**options, logprobs=0, frequency_penalty=2, presence_penalty=2).choices[0].logprobs.tokens
    )
    assert len(set(punished)) > len(set(plain))


def test_top_k_one_is_greedy(small: Running) -> None:
    create = small.client().completions.create
    options: Any = {"model": "tiny", "prompt": "Hello", "max_tokens": 20}
    assert (
        create(**options, temperature=2, extra_body={"top_k": 1}).choices[0].text
        == create(**options, temperature=0).choices[0].text
        == create(**options, temperature=1, top_p=1e-9).choices[0].text
    )


def test_defaults_are_openais(small: Running) -> None:
    answer = small.client().completions.create(model="tiny", prompt="a", extra_body={"ignore_eos": True})
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")
    chat = small.client().chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, extra_body={"ignore_eos": True}
    )
    assert chat.usage.total_tokens == 1024


# -- errors -----------------------------------------------------------------------------------------

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
GOOD_CHAT = {"model": "tiny", "messages": QUESTION}
GOOD_PLAIN = {"model": "tiny", "prompt": "a"}
BAD: list[tuple[str, Any, int, str | None, str | None]] = [
    (CHAT, "{bad", 400, None, "invalid_json"),
    (CHAT, b"\xff\xfe", 400, None, "invalid_json"),
    (CHAT, "", 400, None, "invalid_json"),
    (CHAT, "[]", 400, None, None),
    (CHAT, "null", 400, None, None),
    (CHAT, '"text"', 400, None, None),
    (CHAT, {"model": "tiny"}, 400, "messages", None),
    (CHAT, {"messages": QUESTION}, 400, "model", None),
    (CHAT, GOOD_CHAT | {"model": "other"}, 404, "model", "model_not_found"),
    (CHAT, GOOD_CHAT | {"model": 5}, 400, "model", None),
    (CHAT, GOOD_CHAT | {"messages": []}, 400, "messages", None),
    (CHAT, GOOD_CHAT | {"messages": "hi"}, 400, "messages", None),
    (CHAT, GOOD_CHAT | {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages", None),
    (CHAT, GOOD_CHAT | {"messages": [{"content": "x"}]}, 400, "messages", None),
    (CHAT, GOOD_CHAT | {"messages": [{"role": "user"}]}, 400, "messages", None),
    (CHAT, GOOD_CHAT | {"messages": [{"role": "user", "content": 5}]}, 400, "messages", None),
    (CHAT, GOOD_CHAT | {"response_format": {"type": "xml"}}, 400, "response_format", None),
    (CHAT, GOOD_CHAT | {"structured_outputs": {"regex": "("}}, 400, "structured_outputs", "invalid_grammar"),
    (CHAT, GOOD_CHAT | {"tool_choice": "required"}, 400, "tool_choice", None),
    (CHAT, GOOD_CHAT | {"store": True}, 400, "store", "unsupported_parameter"),
    (CHAT, GOOD_CHAT | {"temperature": "0.5"}, 400, "temperature", None),
    (CHAT, GOOD_CHAT | {"max_tokens": 0}, 400, "max_tokens", None),
    (CHAT, GOOD_CHAT | {"max_tokens": 10**6}, 400, "max_tokens", "context_length_exceeded"),
    (CHAT, GOOD_CHAT | {"max_completion_tokens": 1024}, 400, "max_tokens", "context_length_exceeded"),
    (CHAT, GOOD_CHAT | {"top_logprobs": 3}, 400, "top_logprobs", None),
    (CHAT, GOOD_CHAT | {"top_logprobs": 99, "logprobs": True}, 400, "top_logprobs", None),
    (CHAT, GOOD_CHAT | {"guided_json": {}}, 400, "guided_json", "unsupported_parameter"),
    (CHAT, GOOD_CHAT | {"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    (PLAIN, GOOD_PLAIN | {"prompt": []}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"prompt": ""}, 400, "prompt", None),
    (PLAIN, GOOD_PLAIN | {"prompt": [[]]}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"prompt": [1, "a"]}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"prompt": [-1]}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"prompt": [1.5]}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"prompt": [10**9]}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"prompt": {"a": 1}}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"prompt": [5] * 1024}, 400, None, "context_length_exceeded"),
    (PLAIN, GOOD_PLAIN | {"max_tokens": 0}, 400, "max_tokens", None),
    (PLAIN, GOOD_PLAIN | {"max_tokens": "many"}, 400, "max_tokens", None),
    (PLAIN, GOOD_PLAIN | {"temperature": -1}, 400, "temperature", None),
    (PLAIN, GOOD_PLAIN | {"temperature": "hot"}, 400, "temperature", None),
    (PLAIN, '{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, None, "invalid_json"),
    (PLAIN, '{"model": "tiny", "prompt": ' + "[" * 9000, 400, None, "invalid_json"),
    (PLAIN, '{"model": "tiny", "prompt": "\\udc00"}', 400, None, "invalid_json"),
    (PLAIN, GOOD_PLAIN | {"top_p": 0}, 400, "top_p", None),
    (PLAIN, GOOD_PLAIN | {"top_k": -2}, 400, "top_k", None),
    (PLAIN, GOOD_PLAIN | {"n": 0}, 400, "n", None),
    (PLAIN, GOOD_PLAIN | {"n": 10**6}, 400, "n", None),
    (PLAIN, GOOD_PLAIN | {"best_of": 3, "n": 4}, 400, "best_of", None),
    (PLAIN, GOOD_PLAIN | {"suffix": "end"}, 400, "suffix", "unsupported_parameter"),
    (PLAIN, GOOD_PLAIN | {"stop": ["a"] * 17}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"stop": ""}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"stop": 5}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"logprobs": -1}, 400, "logprobs", None),
    (PLAIN, GOOD_PLAIN | {"seed": "x"}, 400, "seed", None),
    (PLAIN, GOOD_PLAIN | {"presence_penalty": 3}, 400, "presence_penalty", None),
    (PLAIN, GOOD_PLAIN | {"logit_bias": {"a": 1}}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"logit_bias": {"1": 200}}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"logit_bias": {"999999": 1}}, 400, None, None),
    (PLAIN, GOOD_PLAIN | {"echo": "perhaps"}, 400, "echo", None),
    ("/tokenize", {}, 400, "messages", None),
    ("/tokenize", {"prompt": "a", "messages": QUESTION}, 400, "messages", None),
    ("/detokenize", {"tokens": ["a"]}, 400, "tokens[0]", None),
    ("/v1/embeddings", {"model": "tiny", "input": ""}, 400, "input", None),
    ("/v1/responses", {"model": "tiny", "input": "a", "store": True}, 400, "store", "unsupported_parameter"),
    ("/admin/adapters", {"name": "x", "path": "/nothing"}, 400, "path", "adapter_refused"),
    ("/v1/nothing", {}, 404, None, "not_found"),
    ("/v1/models", {}, 405, None, "method_not_allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), BAD, ids=range(len(BAD)))
def test_bad_requests(
    small: Running, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    answer = small.post(path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    streamed = body | {"stream": True} if isinstance(body, dict) and "v1" in path and status == 400 else None
    if streamed and "stream_options" not in streamed:
        assert small.post(path, streamed).status_code == 400


def test_get_of_a_post_path_is_405(small: Running) -> None:
    answer = httpx.get(f"{small.url}{CHAT}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_fields_without_effect_are_accepted(small: Running) -> None:
    extra = {"user": "me", "metadata": {"a": "b"}, "store": False, "response_format": {"type": "text"}}
    extra |= {"tools": [], "tool_choice": "auto", "temperature": None, "stop": None, "n": None}
    assert small.post(CHAT, GOOD_CHAT | extra | {"max_tokens": 2}).status_code == 200


def test_no_cors_headers(small: Running) -> None:
    answer = httpx.get(f"{small.url}/v1/models", headers={"Origin": "http://elsewhere.example"})
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels(small: Running, stream: bool) -> None:
    before = small.ready()["cancelled"]
    body = GOOD_PLAIN | {"max_tokens": 1000, "stream": stream, "n": 8, "ignore_eos": True}
    with (
        pytest.raises((httpx.ReadTimeout, StopIteration)),
        httpx.stream("POST", small.url + PLAIN, json=body, timeout=0.4) as answer,
    ):
        for number, _ in enumerate(answer.iter_lines()):
            if number > 20:
                raise StopIteration
    end = time.monotonic() + 5
    while time.monotonic() < end and small.ready()["cancelled"] < before + 8:
        time.sleep(0.02)
    status = small.ready()
    assert status["cancelled"] == before + 8
    assert status["running"] == status["waiting"] == 0


def test_a_path_that_no_file_system_takes_is_a_bad_request(small: Running) -> None:
    for path in ("0" * 5000, "no/such/folder", "a\0b"):
        answer = small.post("/admin/adapters", {"name": "more", "path": path})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "path", answer.text
