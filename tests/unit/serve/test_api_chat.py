"""Chat: tools, formats, streams; what the engine is asked, and how its answers are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.unit.model.chat_templates import CHATML_TOOLS
from tests.unit.serve.replay import Api

CHAT = "/v1/chat/completions"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
SUB = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "properties": {}}}}
SAYS_ADD = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
SAYS_TWO = SAYS_ADD + '\n<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call>'
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "1 + 1?"}]}


def api(smol: Path, *texts: str, **options: Any) -> Api:
    return Api(smol, texts, template=CHATML_TOOLS, **options)


def test_a_tool_call_is_told_as_one_and_its_text_is_not_content(smol: Path) -> None:
    here = api(smol, SAYS_TWO)
    answer = here.post(CHAT, ASK | {"tools": [ADD, SUB]})
    made = ChatCompletion.model_validate(answer.json(), strict=True)
    [choice] = made.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls or []
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [  # type: ignore[union-attr]
        ("function", "add", {"a": 1}),
        ("function", "sub", {}),
    ]
    assert len({call.id for call in calls}) == 2
    assert '"description": "Adds."' in here.prompt()


def test_streamed_calls_join_to_the_whole_ones(smol: Path) -> None:
    here = api(smol, SAYS_TWO)
    chunks = [ChatCompletionChunk.model_validate(e) for e in here.events(CHAT, ASK | {"tools": [ADD, SUB]})]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for call in (call for delta in deltas for call in delta.tool_calls or ()):
        assert call.function is not None
        if call.id:
            assert call.index not in names
            names[call.index] = call.function.name or ""
        arguments[call.index] = arguments.get(call.index, "") + (call.function.arguments or "")
    assert names == {0: "add", 1: "sub"}
    assert {index: json.loads(text) for index, text in arguments.items()} == {0: {"a": 1}, 1: {}}
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["tool_calls"]
    assert deltas[0].role == "assistant"


def test_without_tools_the_same_text_is_content(smol: Path) -> None:
    for more in ({}, {"tools": [ADD], "tool_choice": "none"}, {"tools": []}):
        here = api(smol, SAYS_ADD)
        [choice] = here.post(CHAT, ASK | more).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (SAYS_ADD, "stop")
        assert "tool_calls" not in choice["message"]
        assert "Tools:" not in here.prompt()


def test_an_answer_cut_within_a_call_says_length(smol: Path) -> None:
    here = api(smol, SAYS_ADD)
    [choice] = here.post(CHAT, ASK | {"tools": [ADD], "max_tokens": 22}).json()["choices"]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    "more",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "add"}}},
        {"parallel_tool_calls": False},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [ADD]}}},
    ],
)
def test_what_is_promised_of_calls_becomes_a_grammar(smol: Path, more: dict[str, Any]) -> None:
    here = api(smol, SAYS_ADD)
    assert here.post(CHAT, ASK | {"tools": [ADD, SUB]} | more).status_code == 200
    grammar = here.engine.asked[0].params.grammar
    assert grammar is not None
    assert grammar.kind == "lark"
    assert "add" in grammar.text


def test_calls_and_results_in_the_history_are_rendered(smol: Path) -> None:
    here = api(smol, "2", SAYS_ADD)
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    said = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "seven"}
    body = ASK | {"messages": [*ASK["messages"], said, result], "tools": [ADD]}
    assert here.post(CHAT, body).status_code == 200
    assert '<tool_call>{"name": "add", "arguments": {"a": 7}}</tool_call>' in here.prompt()
    assert "seven" in here.prompt()


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "mul"}}}, "tool_choice"),
        ({"tools": [ADD, ADD]}, "tools[1].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        # A grammar of its own cannot be a part of another.
        ({"tools": [ADD], "structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "y"}},
                }
            },
            "response_format",
        ),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"store": True}, "store"),
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"temperature": "1"}, "temperature"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(smol: Path, more: dict[str, Any], param: str) -> None:
    here = api(smol, "never said")
    answer = here.post(CHAT, ASK | more)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert error["message"]
    assert here.engine.asked == []


def test_tools_need_a_template_that_shows_them(smol: Path) -> None:
    here = Api(smol, ["no"])
    answer = here.post(CHAT, ASK | {"tools": [ADD]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


FORMATS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, "json_object", ""),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "string"}},
            }
        },
        "json_schema",
        '{"type": "string"}',
    ),
    ({"structured_outputs": {"json": {"type": "integer"}}}, "json_schema", '{"type": "integer"}'),
    ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ({"structured_outputs": {"regex": "[ab]+"}}, "regex", "[ab]+"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "choice", '["yes", "no"]'),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
]


@pytest.mark.parametrize(("more", "kind", "text"), FORMATS)
def test_formats_become_the_grammar_that_the_engine_is_asked(
    smol: Path, more: dict[str, Any], kind: str, text: str
) -> None:
    here = api(smol, "{}")
    assert here.post(CHAT, ASK | more).status_code == 200
    grammar = here.engine.asked[0].params.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.text) == (kind, text)


def test_sampling_is_as_given_and_else_openais_default(smol: Path) -> None:
    here = api(smol, "a", "b")
    here.post(CHAT, ASK)
    plain = here.engine.asked[0].params
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (1.0, 1.0, 0, 0.0)
    assert (plain.repetition_penalty, plain.presence_penalty, plain.frequency_penalty) == (1.0, 0.0, 0.0)
    assert plain.max_new_tokens == 1024 - len(here.engine.asked[0].prompt)
    given = {"temperature": 0.3, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 4}
    here.post(CHAT, ASK | given | {"logit_bias": {"5": -2}, "max_completion_tokens": 9, "n": 1})
    params = here.engine.asked[1].params
    assert {name: getattr(params, name) for name in given} == given
    assert (params.logit_bias, params.max_new_tokens) == ({5: -2.0}, 9)


def test_an_engine_that_dies_in_mid_stream_is_the_streams_last_event(smol: Path) -> None:
    here = api(smol, "one two three four", fails_after=2)
    events = here.events(CHAT, ASK)
    assert events[-1]["error"]["code"] == "engine_unavailable"
    whole = api(smol, "one two three four", fails_after=2).post(CHAT, ASK)
    assert (whole.status_code, whole.json()["error"]["type"]) == (503, "server_error")


def test_a_full_line_is_429_with_a_time_to_wait(smol: Path) -> None:
    here = api(smol)
    here.engine.busy = True
    answer = here.post(CHAT, ASK)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.json()["error"]["code"] == "server_busy"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_an_answer_that_cannot_go_on_says_whose_fault_it_is(smol: Path) -> None:
    plain = api(smol, "x", broken=True).post(CHAT, ASK)
    assert (plain.status_code, plain.json()["error"]["code"]) == (500, "not_finite")
    held = ASK | {"response_format": {"type": "json_object"}}
    whole = api(smol, "x", broken=True).post(CHAT, held)
    assert (whole.status_code, whole.json()["error"]["code"]) == (400, "grammar_failed")
    assert api(smol, "x", broken=True).events(CHAT, held)[-1]["error"]["code"] == "grammar_failed"
