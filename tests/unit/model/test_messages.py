"""Messages and tools in one spelling, and what is wrong with those that have none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.model.chat_templates import CALL, TOOL, assistant, user
from tunesmith.core.errors import UserError
from tunesmith.model.messages import plain_messages, plain_tools

PLAIN_CALL = CALL | {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (user("a") | {"weight": 1, "extra": None}, user("a")),
        ({"role": "developer", "content": "s"}, {"role": "system", "content": "s"}),
        ({"role": "function", "name": "f", "content": "3"}, {"role": "tool", "name": "f", "content": "3"}),
        (user("") | {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, user("ab")),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            assistant("", tool_calls=[PLAIN_CALL]),
        ),
        (
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            assistant("", tool_calls=[{"type": "function", "function": PLAIN_CALL["function"]}]),
        ),
        (assistant("a", thinking="why"), assistant("a", reasoning_content="why")),
        (assistant("a", tool_calls=[]), assistant("a")),
    ],
)
def test_spellings_become_one(given: dict[str, Any], plain: dict[str, Any]) -> None:
    assert plain_messages([given]) == [plain]
    assert plain_messages([plain]) == [plain]


def test_arguments_that_are_not_json_stay_text() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": "{broken"}}
    assert plain_messages([assistant("", tool_calls=[call])])[0]["tool_calls"] == [call]


@pytest.mark.parametrize("given", [[TOOL], [TOOL["function"]], json.dumps([TOOL])])
def test_tools_become_definitions(given: Any) -> None:
    assert plain_tools(given) == [TOOL]


@pytest.mark.parametrize("given", [None, [], "", "[]"])
def test_no_tools_are_none(given: Any) -> None:
    assert plain_tools(given) is None


@pytest.mark.parametrize("given", ["broken", {"name": "f"}, [{"type": "function"}], [3]])
def test_bad_tools_are_named(given: Any) -> None:
    with pytest.raises(UserError, match="tools"):
        plain_tools(given)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("hi", "not a list"),
        ([], "not a list"),
        (["hi"], r"messages\[0\]: 'hi' is not an object"),
        ([{"role": "robot", "content": "x"}], r"messages\[0\].role: 'robot'"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: 3 is not text"),
        ([{"role": "user"}], r"messages\[0\].content: there is none"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "not a text part"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "only the assistant calls tools"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "has no function name"),
    ],
)
def test_bad_messages_are_named(messages: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plain_messages(messages)
