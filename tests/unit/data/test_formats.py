"""Each format's rows and the conversations they mean."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.data.dialogue import Dialogue, RowError
from tunesmith.data.formats import RowShape, shape_of

CALL = {"name": "add", "arguments": {"a": 1}}
PLAIN_CALL = {"type": "function", "function": CALL}
TOOLS = [{"name": "add", "parameters": {}}]
PLAIN_TOOLS = [{"type": "function", "function": TOOLS[0]}]


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def parse(row: Any, wanted: str = "auto", **mapping: str) -> Dialogue:
    return shape_of(row, wanted, mapping, file="f", place="data.sources.0").parse(row)


QA = turns(("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "output": "a"}, QA),
        ({"instruction": "q", "input": "", "output": "a"}, QA),
        ({"instruction": "q", "input": None, "output": "a", "text": "t"}, QA),
        ({"instruction": "q", "input": "i", "output": "a"}, turns(("user", "q\ni"), ("assistant", "a"))),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]},
            turns(("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q"), ("assistant", "a")),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        ({"conversations": QA}, QA),
        (
            {
                "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}],
                "system": "s",
            },
            turns(("system", "s"), ("user", "q"), ("assistant", "a")),
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, *QA], "system": "s"},
            turns(("system", "s"), ("user", "q"), ("assistant", "a")),
        ),
        ({"messages": QA}, QA),
        ({"messages": json.dumps(QA)}, QA),
        ({"messages": [{"from": "human", "value": "q"}, {"role": "assistant", "content": "a"}]}, QA),
        (
            {"messages": [*QA[:1], {"role": "assistant", "content": "a", "tool_calls": None, "name": None}]},
            QA,
        ),
        ({"messages": [{"role": "developer", "content": "s"}, *QA]}, turns(("system", "s")) + QA),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"prompt": "q", "completion": "a", "system": "s"}, turns(("system", "s")) + QA),
        ({"prompt": QA[:1], "completion": QA[1:]}, [QA[0] | {"weight": 0}, QA[1]]),
    ],
)
def test_formats(row: dict[str, Any], expected: list[Any]) -> None:
    assert parse(row).messages == expected


def test_sharegpt_tools() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps(TOOLS),
    }
    parsed = parse(row)
    assert parsed.messages[1] == {"role": "assistant", "content": "", "tool_calls": [PLAIN_CALL]}
    assert parsed.messages[2] == {"role": "tool", "content": "2"}
    assert parsed.tools == PLAIN_TOOLS


def test_openai_tools() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            QA[0],
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "2"},
            {"role": "assistant", "content": "a", "weight": 0},
        ],
        "tools": PLAIN_TOOLS,
    }
    parsed = parse(row)
    assert parsed.messages[1]["tool_calls"] == [PLAIN_CALL | {"id": "c"}]
    assert parsed.messages[2] == {"role": "tool", "content": "2", "tool_call_id": "c"}
    assert parsed.messages[3]["weight"] == 0
    assert parsed.tools == PLAIN_TOOLS


def test_text() -> None:
    assert parse({"text": "once"}) == Dialogue(text="once")


def test_mapping_renames_columns() -> None:
    row = {"question": "q", "reply": "a", "instruction": "other"}
    assert parse(row, instruction="question", output="reply").messages == QA


def test_an_answer_column_follows_the_conversation() -> None:
    row = {
        "conversations": QA[:1],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    assert parse(row, answer="chosen").messages == QA
    assert parse({"messages": QA[:1], "best": "a"}, answer="best").messages == QA
    with pytest.raises(UserError, match="preference data") as caught:
        parse(row)
    assert "{answer: chosen}" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("columns", "wanted", "mapping", "told", "hint"),
    [
        (["a", "b"], "auto", {}, "no format fits the columns 'a', 'b'", "csv"),
        (
            ["instruction", "outputs"],
            "alpaca",
            {},
            "the column 'output' of the format 'alpaca' is missing",
            "'outputs'",
        ),
        (["question", "output"], "alpaca", {"instruction": "qestion"}, "the column 'qestion'", "'question'"),
        (
            ["question", "output"],
            "auto",
            {"instructoin": "question"},
            "'instructoin' is not one of our",
            "'instruction'",
        ),
        (["text"], "text", {"instruction": "text"}, "'instruction' is not one of our columns", "text"),
    ],
)
def test_columns_that_do_not_fit(
    columns: list[str], wanted: str, mapping: dict[str, str], told: str, hint: str
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        shape_of(columns, wanted, mapping, file="f.csv", place="data.sources.0")
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (["a"], "a list, not an object"),
        ({"instruction": "q"}, "has no 'output'"),
        ({"instruction": "q", "output": 3}, r"'output' is 3 \(int\), not text"),
        ({"instruction": ["q"], "output": "a"}, "'instruction' is .* not text"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "not a pair"),
        ({"instruction": "q", "output": "a", "history": "x"}, "'history' is 'x'"),
    ],
)
def test_bad_alpaca_rows(row: Any, told: str) -> None:
    with pytest.raises(RowError, match=told):
        RowShape("alpaca", {}).parse(row)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "has no 'messages'"),
        ({"messages": "hi"}, "'messages' is 'hi'"),
        ({"messages": ["hi"]}, "'hi' .* is not a message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'robot' .* is not a role"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\].content: 1 is not text"),
        ({"messages": [{"role": "user"}]}, "there is none"),
        ({"messages": [{"from": "function_call", "value": "add(1)"}]}, "not JSON with a name"),
        ({"messages": QA, "tools": [{}]}, r"tools\[0\]"),
        ({"messages": [{"role": "system", "content": "s"}], "system": "t"}, "another in its conversation"),
        ({"messages": [QA[0], QA[1] | {"weight": 2}]}, "not 0 or 1"),
    ],
)
def test_bad_message_rows(row: Any, told: str) -> None:
    with pytest.raises(RowError, match=told):
        RowShape("messages", {}).parse(row)


def test_prompt_and_completion_of_two_kinds() -> None:
    with pytest.raises(RowError, match="both be text"):
        RowShape("prompt_completion", {}).parse({"prompt": "q", "completion": QA})


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(RowError, match="surrogate"):
        parse({"text": "\ud83d"}).digest()


@pytest.mark.parametrize(
    ("row", "empty"),
    [
        ({"instruction": "q", "output": " \n"}, True),
        ({"instruction": "", "output": "a"}, True),
        ({"instruction": "q", "output": None}, True),
        ({"messages": []}, True),
        ({"text": " "}, True),
        ({"messages": QA[:1]}, False),
        ({"messages": [QA[0], {"role": "assistant", "tool_calls": [PLAIN_CALL]}]}, False),
    ],
)
def test_empty_rows(row: dict[str, Any], empty: bool) -> None:
    assert parse(row).is_empty is empty


def test_the_digest_is_of_the_content_alone() -> None:
    same = [
        parse({"instruction": "q", "output": "a", "id": 7}),
        parse({"messages": QA}),
        parse({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ]
    assert len({row.digest() for row in same}) == 1
    assert parse({"instruction": "q", "output": "b"}).digest() != same[0].digest()


def test_the_default_system_message_is_for_rows_without() -> None:
    assert parse({"messages": QA}).with_system("s").messages == turns(("system", "s")) + QA
    assert parse({"messages": turns(("system", "t")) + QA}).with_system("s").messages[0]["content"] == "t"
    assert parse({"text": "x"}).with_system("s").text == "x"
