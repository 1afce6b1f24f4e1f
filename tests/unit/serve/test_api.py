"""Every other route: completions, models, tokens, vectors, adapters; and what no route lets through."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from pydantic import ValidationError

from tests.unit.serve.asgi import Client
from tests.unit.serve.replay import Api
from tunesmith.serve.embeddings import AT_ONCE, shortened
from tunesmith.serve.gateway import Gateway
from tunesmith.serve.record import CLIENT_CLOSED
from tunesmith.serve.replies import (
    ChatReply,
    CompletionReply,
    DeletedReply,
    DetokenizeReply,
    EmbeddingReply,
    ErrorReply,
    ModelCard,
    ModelList,
    ResponseReply,
    StateReply,
    TokenizeReply,
)
from tunesmith.serve.schema import CompletionRequest

PLAIN, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
ASK: dict[str, Any] = {"model": "tiny", "prompt": "Once upon a time"}
MESSAGES = [{"role": "user", "content": "hi"}]


# -- completions ------------------------------------------------------------------------------------


def test_completions_of_several_prompts_with_several_answers(smol: Path) -> None:
    here = Api(smol, ["a", "b", "c", "d"])
    made = Completion.model_validate(
        here.post(PLAIN, ASK | {"prompt": ["one", "two"], "n": 2, "seed": 5}).json(), strict=True
    )
    assert [(c.index, c.text, c.finish_reason) for c in made.choices] == [
        (0, "a", "stop"), (1, "b", "stop"), (2, "c", "stop"), (3, "d", "stop"),
    ]  # fmt: skip
    assert [ask.params.seed for ask in here.engine.asked] == [5, 6, 5, 6]
    assert here.engine.asked[0].params.max_new_tokens == 16
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (2, 8)


def test_best_of_gives_the_likeliest_and_counts_all(smol: Path) -> None:
    # The engine above gives longer texts a lower log-probability for every token.
    here = Api(smol, ["long answer", "short", "mid one", "x", "the longest of all", "middling"])
    body = ASK | {"prompt": ["one", "two"], "n": 2, "best_of": 3}
    made = here.post(PLAIN, body).json()
    assert [choice["text"] for choice in made["choices"]] == ["short", "mid one", "x", "middling"]
    assert [choice["index"] for choice in made["choices"]] == [0, 1, 2, 3]
    assert made["choices"][0]["logprobs"] is None
    assert made["usage"]["completion_tokens"] > 10
    assert len(here.engine.asked) == 6


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 65}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [49152]}, "prompt"),
        ({"prompt": [5] * 1020}, "max_tokens"),
        ({"prompt": [True]}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"echo": 1}, "echo"),
        ({"n": "2"}, "n"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
    ],
)
def test_what_cannot_be_completed_is_refused_by_name(smol: Path, more: dict[str, Any], param: str) -> None:
    answer = Api(smol).post(PLAIN, ASK | more)
    error = answer.json()["error"]
    assert (answer.status_code, re.split(r"[.[]", str(error["param"]))[0]) == (400, param), error


# -- tokens -----------------------------------------------------------------------------------------


def test_tokens_and_back(smol: Path) -> None:
    here = Api(smol)
    made = here.post("/tokenize", {"prompt": "hello there", "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == 1024
    assert here.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": "hello there"}
    ids = here.post("/tokenize", {"model": "tiny", "messages": MESSAGES}).json()["tokens"]
    assert here.post("/detokenize", {"tokens": ids}).json()["prompt"].endswith("<|im_start|>assistant\n")
    assert here.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}),
        ("/tokenize", {"prompt": "a", "tools": []}),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": False}),
        ("/detokenize", {"tokens": [49152]}),
        ("/detokenize", {"tokens": [-1]}),
    ):
        assert here.post(path, body).status_code == 400, body


# -- vectors ----------------------------------------------------------------------------------------


def test_vectors(smol: Path) -> None:
    here = Api(smol)
    made = here.post(EMBED, {"model": "tiny", "input": ["a", "a b"]}).json()
    parsed = CreateEmbeddingResponse.model_validate(made)
    assert [entry.embedding for entry in parsed.data] == [[0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    assert "causal" in made["pooling"]
    assert made["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    coded = here.post(EMBED, {"model": "tiny", "input": [5], "encoding_format": "base64"}).json()
    raw = base64.b64decode(coded["data"][0]["embedding"])
    assert struct.unpack("<4f", raw) == pytest.approx((0.6, 0.8, 0.0, 0.0))
    short = here.post(EMBED, {"model": "tiny", "input": [[5], [6, 7]], "dimensions": 1}).json()
    assert [entry["embedding"] for entry in short["data"]] == [[1.0], [0.0]]


def test_no_more_is_embedded_for_a_client_who_has_gone(smol: Path) -> None:
    here, calls = Api(smol), []
    body = json.dumps({"model": "tiny", "input": ["a"] * 100}).encode()
    client = Client(EMBED, headers={"content-type": "application/json"}, chunks=[body])

    async def embed(prompts: list[list[int]], adapter: str | None = None) -> list[list[float]]:
        calls.append(len(prompts))
        client.leave()
        await asyncio.sleep(0.01)
        return [[1.0]] * len(prompts)

    here.engine.embed = embed  # type: ignore[method-assign,assignment]
    assert asyncio.run(client.run(here.app)).status == CLIENT_CLOSED
    assert calls == [AT_ONCE]


def test_shortened_vectors_have_length_1() -> None:
    vector = shortened([0.1, -0.2, 0.3, 0.4], 3)
    assert math.hypot(*vector) == pytest.approx(1.0)
    assert vector[1] / vector[0] == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [5] * 1025}, "input"),
        ({"input": [49152]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"dimensions": 5}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_what_has_no_vector_is_refused_by_name(smol: Path, more: dict[str, Any], param: str) -> None:
    answer = Api(smol).post(EMBED, {"model": "tiny", "input": "a"} | more)
    assert (answer.status_code, answer.json()["error"]["param"].split("[")[0]) == (400, param)


# -- models and adapters ----------------------------------------------------------------------------


def test_adapters_come_and_go_as_models(smol: Path) -> None:
    here = Api(smol, ["said"])
    made = here.post("/admin/adapters", {"name": "orders/v1", "path": "runs/orders"})
    assert made.status_code == 200
    Model.model_validate(made.json(), strict=True)
    assert here.engine.adapters == {"orders/v1": Path("runs/orders")}
    assert [card["id"] for card in here.ask("GET", "/v1/models").json()["data"]] == ["tiny", "orders/v1"]
    assert here.ask("GET", "/v1/models/orders/v1").json()["id"] == "orders/v1"
    assert here.post(PLAIN, ASK | {"model": "orders/v1"}).json()["model"] == "orders/v1"
    assert here.engine.asked[0].adapter == "orders/v1"
    state = here.ask("GET", "/admin/state").json()
    assert state["engine"]["adapters"] == ["orders/v1"]
    gone = here.ask("DELETE", "/admin/adapters/orders/v1")
    assert gone.json() == {"id": "orders/v1", "object": "model", "deleted": True}
    assert here.post(PLAIN, ASK | {"model": "orders/v1"}).status_code == 404
    assert here.engine.adapters == {}


def test_the_names_that_vllm_gave_do_the_same(smol: Path) -> None:
    here = Api(smol)
    assert here.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}).status_code == 200
    assert list(here.gateway.models) == ["tiny", "x"]
    assert here.post("/v1/unload_lora_adapter", {"lora_name": "x"}).status_code == 200
    assert list(here.gateway.models) == ["tiny"]


def test_adapters_that_cannot_be_are_refused_and_change_nothing(smol: Path) -> None:
    here = Api(smol)
    for body, status, code in (
        ({"name": "x", "path": "nothing"}, 400, "adapter_refused"),
        ({"name": "x", "path": "some/bad"}, 400, "adapter_refused"),
        ({"name": "tiny", "path": "y"}, 409, "name_taken"),
        ({"name": "", "path": "y"}, 400, None),
        ({"name": "x", "path": "a\0b"}, 400, None),
        ({"name": "x"}, 400, None),
    ):
        answer = here.post("/admin/adapters", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert here.ask("DELETE", "/admin/adapters/tiny").status_code == 404
    assert list(here.gateway.models) == ["tiny"]
    here.gateway.open_adapter = None
    answer = here.post("/admin/adapters", {"name": "x", "path": "y"})
    assert answer.json()["error"]["code"] == "adapters_not_supported"


def test_while_loading_every_answer_is_503(smol: Path) -> None:
    here = Api(smol)
    here.gateway.engine, here.gateway.models = None, {}
    for method, path, body in (
        ("GET", "/v1/models", None),
        ("POST", PLAIN, ASK),
        ("POST", "/admin/adapters", {"name": "x", "path": "y"}),
    ):
        answer = here.ask(method, path, json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "model_loading"
    assert here.ask("GET", "/health").status_code == 200
    assert here.ask("GET", "/ready").json() == {"status": "loading"}
    assert here.ask("GET", "/admin/state").json() == {"engine": None, "models": []}
    assert Gateway().models == {}


# -- bodies -----------------------------------------------------------------------------------------

RAW: list[tuple[bytes, int, str]] = [
    (b"", 400, "not valid JSON"),
    (b"\xff\xfe", 400, "byte 0 is not UTF-8"),
    (b'{"a": ', 400, "line 1 column 7"),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "NaN is no number"),
    (b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}', 400, "-Infinity is no number"),
    (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400, "1e999 is out of range"),
    (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "5000 digits"),
    (b'{"model": "tiny", "prompt": "a", "seed": 99999999999999999999}', 400, "20 digits"),
    (b'{"model": "tiny", "prompt": "a", "seed": 9223372036854775808}', 400, "seed"),
    (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "surrogate"),
    (b'{"model": "tiny", "prompt": ' + b"[" * 65 + b"1" + b"]" * 65 + b"}", 400, "64 levels"),
    (b"[" * 100_000, 400, "64 levels"),
    (b'{"model": "ti\\u0000ny", "prompt": "a"}', 404, "does not exist"),
    (b'"text"', 400, "body"),
    (b"null", 400, "body"),
]


@pytest.mark.parametrize(("raw", "status", "says"), RAW, ids=range(len(RAW)))
def test_bodies_that_are_no_request(smol: Path, raw: bytes, status: int, says: str) -> None:
    here = Api(smol)
    answer = here.ask("POST", PLAIN, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]
    ErrorReply.model_validate(answer.json(), strict=True)


def test_numbers_and_characters_that_only_look_odd_are_taken(smol: Path) -> None:
    here = Api(smol, ["a"] * 3)
    for raw in (
        b'{"model": "tiny", "prompt": "12345678901234567890123 \\ud83d\\ude42 \\u0000"}',
        b'{"model": "tiny", "prompt": "a", "seed": -9223372036854775808}',
        b'{"model": "tiny", "prompt": "[[[[[[{{{{{{' + b"[" * 100 + b'"}',
    ):
        answer = here.ask(
            "POST", PLAIN, content=raw, headers={"content-type": "application/json; charset=utf-8"}
        )
        assert answer.status_code == 200, answer.text
    assert "🙂 \x00" in here.prompt(0)


@pytest.mark.parametrize(
    "kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_only_json_is_read_as_json(smol: Path, kind: str) -> None:
    raw = json.dumps(ASK).encode()
    answer = Api(smol).ask("POST", PLAIN, content=raw, headers={"content-type": kind} if kind else {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_content_type")


LARGE: list[tuple[str, dict[str, Any], str]] = [
    (PLAIN, ASK | {"prompt": "word " * 200_000}, "characters are more than that in any case"),
    (CHAT, {"model": "tiny", "messages": [{"role": "user", "content": "x" * 10**6}]}, "in any case"),
    (EMBED, {"model": "tiny", "input": "word " * 200_000}, "in any case"),
    (PLAIN, ASK | {"prompt": ["a"] * 2049}, "at most 2048"),
    (PLAIN, ASK | {"prompt": ["a"] * 2048, "n": 64}, "too many"),
    (PLAIN, ASK | {"logit_bias": {str(i): 1 for i in range(5000)}}, "more than 4096"),
    (PLAIN, ASK | {f"x{i}": 1 for i in range(300)}, "more than 256"),
    (PLAIN, ASK | {"x" * 5000: 1}, "not supported"),
]


@pytest.mark.parametrize(("path", "body", "says"), LARGE, ids=range(len(LARGE)))
def test_what_is_too_much_is_refused_in_few_words(
    smol: Path, path: str, body: dict[str, Any], says: str
) -> None:
    answer = Api(smol).post(path, body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert says in error["message"]
    assert len(answer.content) < 1500


def test_a_list_of_many_faults_is_one_fault() -> None:
    for body in (
        {"prompt": [1.5] * 1000},
        {"prompt": [[1.5] * 100] * 100},
        {"prompt": ["a", 1] * 1000},
        {"prompt": "a", "stop": [5] * 1000},
    ):
        with pytest.raises(ValidationError) as fault:
            CompletionRequest.model_validate({"model": "tiny"} | body)
        assert fault.value.error_count() <= 4


# -- what the API says of itself --------------------------------------------------------------------


def test_answers_are_as_the_description_says(smol: Path) -> None:
    here = Api(smol, ["a"] * 9)
    for reply, method, path, body in (
        (CompletionReply, "POST", PLAIN, ASK | {"logprobs": 1}),
        (ChatReply, "POST", CHAT, {"model": "tiny", "messages": MESSAGES, "logprobs": True}),
        (ResponseReply, "POST", "/v1/responses", {"model": "tiny", "input": "a"}),
        (EmbeddingReply, "POST", EMBED, {"model": "tiny", "input": "a"}),
        (TokenizeReply, "POST", "/tokenize", {"prompt": "a"}),
        (DetokenizeReply, "POST", "/detokenize", {"tokens": [5]}),
        (ModelList, "GET", "/v1/models", None),
        (ModelCard, "GET", "/v1/models/tiny", None),
        (ModelCard, "POST", "/admin/adapters", {"name": "x", "path": "y"}),
        (StateReply, "GET", "/admin/state", None),
        (DeletedReply, "DELETE", "/admin/adapters/x", None),
        (ErrorReply, "GET", "/nothing", None),
        (ErrorReply, "PUT", PLAIN, None),
    ):
        reply.model_validate_json(here.ask(method, path, json=body).content, strict=True)


def test_the_description_names_every_status(smol: Path) -> None:
    described = Api(smol).ask("GET", "/openapi.json").json()
    for path, routes in described["paths"].items():
        for method, route in routes.items():
            assert "422" not in route["responses"], (path, method)
            schema = route["responses"]["200"]["content"]
            assert schema, (path, method)
            if path not in ("/health", "/ready"):
                assert {"4XX", "429", "503"} <= set(route["responses"]), (path, method)
    answers = described["paths"][PLAIN]["post"]["responses"]["200"]["content"]
    assert set(answers) == {"application/json", "text/event-stream"}


def test_every_reference_of_the_description_leads_somewhere(smol: Path) -> None:
    described = Api(smol).ask("GET", "/openapi.json").json()
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(described)))
    assert len(references) > 20
    for reference in references:
        place = described
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
