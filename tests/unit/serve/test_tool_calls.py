"""Tool calls read out of an answer: in every form, cut anywhere."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.unit.serve.tool_templates import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, XML
from tunesmith.serve.tool_calls import (
    CallDelta,
    ToolFormat,
    ToolParser,
    marker_ids,
    parse,
    tool_format,
    whole_calls,
)

NAMES = ("get_weather", "search")
WEATHER = '{"name": "get_weather", "arguments": {"city": "Köln"}}'
SEARCH = '{"name": "search", "arguments": {"query": "a \\"b\\" }", "at": [1, {"x": null}]}}'


@pytest.fixture(scope="module")
def smol_tokenizer(smol: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smol)


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


Read = tuple[str, list[tuple[str, str]]]


def read(kind: ToolFormat, pieces: list[str]) -> Read:
    """(content, [(name, arguments)]) of an answer that comes in `pieces`; checks the deltas' form."""
    parser, content, deltas = ToolParser(kind, NAMES), "", []
    for delta in [*map(parser.push, pieces), parser.finish()]:
        content += delta.content
        deltas += delta.calls
    check_deltas(deltas)
    calls = whole_calls(deltas)
    assert parser.num_calls == len(calls)
    return content, [(call.name, call.arguments) for call in calls]


def check_deltas(deltas: list[CallDelta]) -> None:
    """A call begins with its id and name and nothing of its arguments; calls come one after the other."""
    seen = -1
    for delta in deltas:
        if delta.index > seen:
            assert delta.index == seen + 1
            assert delta.id
            assert delta.name
            assert delta.arguments == ""
            seen = delta.index
        else:
            assert delta.index == seen
            assert delta.id is None
            assert delta.name is None
            assert delta.arguments


ANSWERS: list[tuple[ToolFormat, str, Read]] = [
    ("hermes", "No call <tool, > here.\n", ("No call <tool, > here.\n", [])),
    ("hermes", "", ("", [])),
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", ("", [("get_weather", '{"city": "Köln"}')])),
    (
        "hermes",
        f"Let me see.\n\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>{SEARCH}</tool_call>\n",
        (
            "Let me see.",
            [
                ("get_weather", '{"city": "Köln"}'),
                ("search", '{"query": "a \\"b\\" }", "at": [1, {"x": null}]}'),
            ],
        ),
    ),
    # A name that no tool has is the client's to refuse, as with OpenAI.
    ("hermes", '<tool_call>{"name": "other", "arguments": {}}</tool_call>', ("", [("other", "{}")])),
    ("hermes", '<tool_call>{"arguments":{"a":1},"name":"search"}', ("", [("search", '{"a":1}')])),
    ("hermes", '<tool_call>{"name": "search", "parameters": {"a": 1}}', ("", [("search", '{"a": 1}')])),
    (
        "hermes",
        '<tool_call>{"name": "search", "arguments": "{\\"a\\": 1}"}</tool_call>',
        ("", [("search", '{"a": 1}')]),
    ),
    ("hermes", '<tool_call>{"name": "search"}</tool_call>', ("", [("search", "{}")])),
    (
        "hermes",
        '<tool_call>\n[{"name": "search", "arguments": {}}, {"name": "search", "arguments": {}}]\n</tool_call>',
        ("", [("search", "{}"), ("search", "{}")]),
    ),
    ("hermes", f"<tool_call>{WEATHER}</tool_call> Done.", ("Done.", [("get_weather", '{"city": "Köln"}')])),
    ("hermes", f"A <tool_call>{WEATHER}</tool_call> B", ("A B", [("get_weather", '{"city": "Köln"}')])),
    # What is no call stays where it is.
    ("hermes", "x <tool_call>\nhello\n</tool_call> y", ("x <tool_call>\nhello\n</tool_call> y", [])),
    ("hermes", '<tool_call>{"nam": 3}</tool_call>', ('<tool_call>{"nam": 3}</tool_call>', [])),
    ("hermes", '<tool_call>{"name": "search", "arguments": 3}', ('<tool_call>{"name": "search", "arguments": 3}', [])),
    (
        "hermes",
        f'<tool_call>{{"name": 4}}<tool_call>{WEATHER}</tool_call>',
        ('<tool_call>{"name": 4}', [("get_weather", '{"city": "Köln"}')]),
    ),
    # Cut by max_tokens: within the arguments it is a call, before them nothing yet.
    ("hermes", '<tool_call>\n{"name": "search", "arguments": {"q": "ab', ("", [("search", '{"q": "ab')])),
    ("hermes", '<tool_call>\n{"name": "sea', ('<tool_call>\n{"name": "sea', [])),
    ("hermes", "Now <tool_", ("Now <tool_", [])),
    ("llama3", '{"name": "search", "parameters": {"q": 1}}', ("", [("search", '{"q": 1}')])),
    (
        "llama3",
        '<|python_tag|>{"type": "function", "name": "other", "parameters": {}}',
        ("", [("other", "{}")]),
    ),
    (
        "llama3",
        ' {"name": "search", "parameters": {"q": 1}}; {"name": "search", "parameters": {}}',
        ("", [("search", '{"q": 1}'), ("search", "{}")]),
    ),
    # Without a marker only what names a tool is a call: an answer may be JSON.
    ("llama3", '{"name": "Ada", "parameters": {}}', ('{"name": "Ada", "parameters": {}}', [])),
    ("llama3", '{"answer": {"name": "search"}}', ('{"answer": {"name": "search"}}', [])),
    ("llama3", ' {"name"', (' {"name"', [])),
    ("llama3", '{"name": "search"}', ('{"name": "search"}', [])),
    ("llama3", '{"name": "search", "parameters": "{}"}', ("", [("search", "{}")])),
    ("llama3", "Use {} for it.", ("Use {} for it.", [])),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "search", "arguments": {"q": 1}, "id": "abcdefghi"}, {"name": "other", "arguments": {}}]',
        ("", [("search", '{"q": 1}'), ("other", "{}")]),
    ),
    (
        "mistral",
        'One moment. [TOOL_CALLS][{"name": "search", "arguments": {}}]',
        ("One moment.", [("search", "{}")]),
    ),
    ("mistral", '[{"name": "search", "arguments": {}}]', ("", [("search", "{}")])),
    ("mistral", '[{"name": "Ada", "arguments": {}}]', ('[{"name": "Ada", "arguments": {}}]', [])),
    ("mistral", "[1, 2, {}] is a list.", ("[1, 2, {}] is a list.", [])),
    (
        "mistral_args",
        'Wait. [TOOL_CALLS]search[ARGS]{"q": {"a": "}"}}[TOOL_CALLS]other[CALL_ID]abcdefghi[ARGS]{}',
        ("Wait.", [("search", '{"q": {"a": "}"}}'), ("other", "{}")]),
    ),
    ("mistral_args", '[TOOL_CALLS]search[ARGS]{"q', ("", [("search", '{"q')])),
    ("mistral_args", "[TOOL_CALLS]search[ARG", ("[TOOL_CALLS]search[ARG", [])),
    ("mistral_args", "[TOOL_CALLS]search me {}", ("[TOOL_CALLS]search me {}", [])),
    ("mistral_args", "search[ARGS]{}", ("search[ARGS]{}", [])),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "expected"), ANSWERS)
def test_whole_in_two_pieces_and_by_the_character(kind: ToolFormat, text: str, expected: Read) -> None:
    assert read(kind, [text]) == expected
    assert read(kind, list(text)) == expected
    for at in range(1, len(text)):
        assert read(kind, [text[:at], text[at:]]) == expected, at


def test_any_text_read_in_any_pieces() -> None:
    parts = [
        *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "<|python_tag|>", "[", "]", "f[ARGS]", "[CALL_ID]a", "{", "}", ",", ";"),
        *(WEATHER, SEARCH, '{"name": "search", ', '"arguments": ', '"parameters"', ": {", '"', "\\", '\\"', "\n"),
        *(" ", "text", "é🙂", "3", "null", '{"name": "search", "parameters": {"a": "}"}}'),
    ]  # fmt: skip
    chance = random.Random(0)
    for _ in range(600):
        text = "".join(chance.choices(parts, k=chance.randint(1, 9)))
        cuts = sorted(chance.sample(range(len(text) + 1), min(len(text), chance.randint(0, 6))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        for kind in ("hermes", "llama3", "mistral", "mistral_args"):
            assert read(kind, pieces) == read(kind, [text]), (kind, pieces)


def test_nothing_is_held_back_longer_than_it_must() -> None:
    parser = ToolParser("hermes", NAMES)
    assert parser.push("Hello wor").content == "Hello wor"
    assert parser.push("ld <to").content == "ld"
    assert parser.push("ast").content == " <toast"
    assert parser.push(' <tool_call>\n{"name": "search", "arg').calls == ()
    name, arguments = parser.push('uments": {"q": ').calls
    assert (name.index, name.name, arguments.arguments) == (0, "search", '{"q": ')
    assert parser.push('"x').calls == (CallDelta(0, '"x'),)
    assert parser.push('"}').calls == (CallDelta(0, '"}'),)
    assert parser.push("}\n</tool_").calls == ()
    assert parser.finish().content == ""


def test_ids_are_unique_and_of_the_form_that_the_template_takes() -> None:
    text = f"<tool_call>{WEATHER}</tool_call>" * 20
    _, calls = parse(text, "hermes", NAMES)
    assert len({call.id for call in calls}) == 20
    assert all(call.id.startswith("call_") for call in calls)
    _, calls = parse(f"[TOOL_CALLS][{', '.join([WEATHER] * 20)}]", "mistral", NAMES)
    assert len({call.id for call in calls}) == 20
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (HERMES, "hermes"),
        (LLAMA3, "llama3"),
        (MISTRAL, "mistral"),
        (MISTRAL_ARGS, "mistral_args"),
        (XML, None),
    ],
)
def test_the_form_is_what_the_template_writes(
    template: str, kind: ToolFormat | None, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tool_format(with_template(smol_tokenizer, template)) == kind


def test_a_template_without_calls_and_none_at_all(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    assert tool_format(smol_tokenizer) is None
    own = with_template(smol_tokenizer, "")
    assert tool_format(own) is None
    own.chat_template = HERMES
    assert tool_format(own) == "hermes"


@pytest.mark.parametrize(
    ("template", "kind", "most"),
    [
        (HERMES, "hermes", 3),
        (LLAMA3, "llama3", 1),
        (MISTRAL, "mistral", 3),
        (MISTRAL_ARGS, "mistral_args", 3),
    ],
)
def test_calls_that_a_template_wrote_are_read_back(
    template: str, kind: ToolFormat, most: int, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = with_template(smol_tokenizer, template)
    chance = random.Random(1)
    for _ in range(25):
        wanted = [(chance.choice(NAMES), random_arguments(chance)) for _ in range(chance.randint(1, most))]
        content = chance.choice(["", "Let me look.", "Two\n\nlines { and <tool>"]) if kind == "hermes" else ""
        text = answer_text(tokenizer, content, wanted)
        got, calls = parse(text, kind, NAMES)
        assert got == content
        assert [(call.name, json.loads(call.arguments)) for call in calls] == wanted
        # What the client sends back is rendered as the model had written it.
        assert answer_text(tokenizer, content, wanted, ids=[call.id for call in calls])


def random_arguments(chance: random.Random) -> dict[str, Any]:
    values: list[Any] = [
        1, -2.5, True, None, "", "Köln", 'a "quoted" \\ text', "</tool_call>", "{", "]}", "🙂\n", [], {},
        [1, [2, {"a": "}"}]], {"name": "search", "arguments": {}}, "<tool_call>",
    ]  # fmt: skip
    keys = chance.sample(["q", "größe", "name", "arguments", "a b", 'x"y'], chance.randint(0, 4))
    return {key: chance.choice(values) for key in keys}


def answer_text(
    tokenizer: Any, content: str, calls: list[tuple[str, dict[str, Any]]], ids: list[str] | None = None
) -> str:
    """What the template writes for an answer, as the model would have: from its prompt to its stop token."""
    tool_calls = [
        {"id": one_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for (name, arguments), one_id in zip(calls, ids or ["abcdefghi"] * len(calls), strict=True)
    ]
    user = {"role": "user", "content": "?"}
    answer = {"role": "assistant", "content": content, "tool_calls": tool_calls}
    before = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template([user, answer], tokenize=False)
    text = text[len(before.rstrip("\n")) :].lstrip("\n")
    for end in ("<|im_end|>\n", "<|im_end|>", tokenizer.eos_token):
        text = text.removesuffix(end)
    return str(text)


def test_special_markers_are_named_so_that_the_text_keeps_them(
    smol_tokenizer: PreTrainedTokenizerBase,
) -> None:
    own = copy.deepcopy(smol_tokenizer)
    assert marker_ids(own, "mistral") == frozenset()
    own.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "<|python_tag|>"]})
    own.add_tokens(["<tool_call>", "</tool_call>"])
    assert marker_ids(own, "mistral") == {own.convert_tokens_to_ids("[TOOL_CALLS]")}
    assert marker_ids(own, "llama3") == {own.convert_tokens_to_ids("<|python_tag|>")}
    own.add_special_tokens({"additional_special_tokens": ["[ARGS]"]})
    assert len(marker_ids(own, "mistral_args")) == 2
    # A token that is not special is in every text.
    assert marker_ids(own, "hermes") == frozenset()


@pytest.mark.parametrize("pieces", [1, 3, 1000])
def test_an_answer_that_is_either_has_no_calls_within_its_text(pieces: int) -> None:
    def read_either(kind: ToolFormat, text: str) -> tuple[str, int]:
        parser = ToolParser(kind, NAMES, either=True)
        cut = [text[at : at + pieces] for at in range(0, len(text), pieces)]
        deltas = [*map(parser.push, cut), parser.finish()]
        return "".join(delta.content for delta in deltas), parser.num_calls

    call = f"<tool_call>\n{WEATHER}\n</tool_call>"
    for text in (f"Well: {call}", f" {call}", f"<tool_calm> {call}", "", "<tool_ca", "a\n \n"):
        assert read_either("hermes", text) == (text, 0)
    assert read_either("hermes", f"{call}\n{call}") == ("", 2)
    said = json.dumps({"a": "[TOOL_CALLS] " + WEATHER})
    assert read_either("mistral", said) == (said, 0)
    assert read_either("mistral", f"[TOOL_CALLS][{WEATHER}, {WEATHER}]") == ("", 2)
    assert read_either("llama3", '{"sum": 1}<|python_tag|>{"name": "search"}')[1] == 0
    assert read_either("llama3", '{"name": "search", "parameters": {}}') == ("", 1)
