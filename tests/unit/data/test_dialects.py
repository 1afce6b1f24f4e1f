"""Rows as single data sets write them."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.data.dialogue import RowError
from tunesmith.data.formats import RowShape, shape_of


def said(shape: str, row: dict[str, Any]) -> list[tuple[str, str]]:
    parsed = shape_of(row, shape, {}, file="rows.jsonl", place="data.sources.0").parse(row)
    return [(message["role"], message["content"]) for message in parsed.messages]


def test_guanaco_text_becomes_turns_and_a_last_question_is_left_out() -> None:
    text = "### Human: What?### Assistant: That: so.\n### Human: And?### Assistant: Yes.### Human: Hm?"
    assert said("guanaco", {"text": text}) == [
        ("user", "What?"),
        ("assistant", "That: so."),
        ("user", "And?"),
        ("assistant", "Yes."),
    ]
    assert RowShape("guanaco", {}).parse({"text": "no turns"}).is_empty


def test_turns_with_system_and_an_answer_that_is_not_learned() -> None:
    row = {
        "conversation": [
            {"system": "S", "input": "a", "output": "b", "output_with_loss": False},
            {"input": "c", "output": "d"},
        ]
    }
    assert said("turns", row) == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]
    weights = [m.get("weight") for m in RowShape("turns", {}).parse(row).messages if m["role"] == "assistant"]
    assert weights == [0, None]
    assert shape_of(row, "auto", {}, file="f", place="p").format == "turns"


def test_moss_marks_are_taken_off_and_tool_results_come_back_as_the_users() -> None:
    plain = {
        "Human": "<|Human|>: Hi<eoh>\n",
        "Commands": "<|Commands|>: None<eoc>\n",
        "MOSS": "<|MOSS|>: Yo<eom>\n",
    }
    tool = plain | {
        "Inner Thoughts": "<|Inner Thoughts|>: Look it up.<eot>\n",
        "Commands": '<|Commands|>: Search("x")<eoc>\n',
        "Tool Responses": "<|Results|>: found<eor>\n",
    }
    row = {"meta_instruction": "You are MOSS.\n", "chat": {"turn_1": plain, "turn_2": tool}}
    assert said("moss", row) == [
        ("system", "You are MOSS.\n"),
        ("user", "Hi"),
        ("assistant", "Yo"),
        ("user", "Hi"),
        ("assistant", 'Inner Thoughts: Look it up.\nCommands: Search("x")'),
        ("user", "found"),
        ("assistant", "Yo"),
    ]


@pytest.mark.parametrize(
    ("shape", "row", "fault"),
    [
        ("turns", {"conversation": ["x"]}, "is not a turn"),
        ("turns", {"conversation": [{"input": "a", "output": "b"}, {"system": "S"}]}, "later turn"),
        ("turns", {"conversation": [{"input": 3, "output": "b"}]}, "not text"),
        ("moss", {"chat": []}, "not an object with turns"),
        ("moss", {"chat": {"first": {}}}, "is not a turn of a MOSS chat"),
        ("guanaco", {"text": 5}, "not text"),
    ],
)
def test_bad_rows_are_named(shape: str, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(RowError, match=fault):
        said(shape, row)


def test_the_mark_of_a_missing_answer_in_the_alpaca_data_is_no_answer() -> None:
    assert RowShape("alpaca", {}).parse({"instruction": "I", "output": "<nooutput>"}).is_empty
