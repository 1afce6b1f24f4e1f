"""What tools and tool_choice ask of an answer, and whether answers keep to it."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.random_answers import random_answers
from tests.unit.serve.tool_templates import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS
from tunesmith.core.errors import UserError
from tunesmith.model.grammar import Grammars, GrammarSpec
from tunesmith.serve.tool_calls import ToolFormat, parse
from tunesmith.serve.tool_grammar import ToolPlan, plan_tools

VOCAB, EOS = 49152 + 16, 2
FORMS: dict[ToolFormat, str] = {
    "hermes": HERMES,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral_args": MISTRAL_ARGS,
}

WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Köln", "北京", 'New "York"']},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"type": "array", "items": {"enum": ["C", "F"]}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
POINT_SCHEMA = {
    "$ref": "#/$defs/point",
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}},
            "required": ["x", "next"],
            "additionalProperties": False,
        }
    },
}  # fmt: skip
SCHEMAS = {"get_weather": WEATHER_SCHEMA, "draw-point": POINT_SCHEMA}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMAS.get(name)} | more}


TOOLS = [tool("get_weather"), tool("draw-point")]


@pytest.fixture(scope="module")
def smol_tokenizer(smol: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smol)


@pytest.fixture(scope="module")
def tokenizers(smol_tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    """One for each form; `+`: its markers are single tokens, as in the models that come with them."""
    made = {}
    for kind, template in FORMS.items():
        made[kind] = copy.deepcopy(smol_tokenizer)
        made[kind].chat_template = template
        made[f"{kind}+"] = copy.deepcopy(made[kind])
    made["hermes+"].add_tokens(["<tool_call>", "</tool_call>"])
    made["mistral+"].add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    made["mistral_args+"].add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]"]})
    made["llama3+"].add_special_tokens({"additional_special_tokens": ["<|python_tag|>"]})
    made["none"] = smol_tokenizer
    return made


@lru_cache(maxsize=16)
def grammars_of(tokenizer: PreTrainedTokenizerBase) -> Grammars:
    return Grammars(tokenizer, VOCAB, (EOS,))


def accepts(tokenizer: Any, plan: ToolPlan, text: str) -> bool:
    assert plan.grammar is not None
    matcher = grammars_of(tokenizer).matcher(plan.grammar)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return all(matcher.advance(token) for token in ids) and matcher.may_end


def planned(tokenizer: Any, tools: list[dict[str, Any]] | None = None, **asked: Any) -> ToolPlan:
    plan = plan_tools(tokenizer, TOOLS if tools is None else tools, **asked)
    assert plan is not None
    return plan


@pytest.mark.parametrize("kind", ["none", *FORMS, *(f"{kind}+" for kind in FORMS)])
@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "draw-point"}}],
    ids=["required", "named"],
)
def test_random_answers_are_calls_whose_arguments_are_valid(
    kind: str, choice: Any, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[kind]
    plan = planned(tokenizer, tool_choice=choice)
    assert plan.forced
    assert plan.is_native == (kind != "none")
    assert plan.grammar is not None
    grammars = Grammars(tokenizer, VOCAB, (EOS,))
    ended = [
        t for t in random_answers(grammars, plan.grammar, tokenizer, range(6), most=250) if t is not None
    ]
    assert ended
    for text in ended:
        content, calls = parse(text, plan.kind, plan.names)
        assert content == ""
        assert calls
        assert choice == "required" or [call.name for call in calls] == ["draw-point"]
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def with_args(*calls: str) -> str:
    whole = [json.loads(call) for call in calls]
    return "".join(
        f"[TOOL_CALLS]{call['name']}[ARGS]{json.dumps(call['arguments'], ensure_ascii=False)}"
        for call in whole
    )


GOOD = '{"name": "get_weather", "arguments": {"city": "Köln", "days": 3}}'
POINT = '{"name": "draw-point", "arguments": {"x": true, "next": null}}'
LOOSE = '{"name": "get_weather", "arguments": {"anything": [1]}}'


@pytest.mark.parametrize("kind", ["hermes", "hermes+"])
def test_required_takes_calls_and_nothing_else(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[kind]
    plan = planned(tokenizer, tool_choice="required")
    for good in (hermes(GOOD), hermes(POINT, GOOD, GOOD)):
        assert accepts(tokenizer, plan, good)
    for bad in ("", "Hello", "Hi " + hermes(GOOD), hermes(LOOSE), hermes(GOOD) + "!", hermes("{}")):
        assert not accepts(tokenizer, plan, bad), bad
    one = planned(tokenizer, tool_choice="required", parallel=False)
    assert accepts(tokenizer, one, hermes(POINT))
    assert not accepts(tokenizer, one, hermes(POINT, GOOD))


@pytest.mark.parametrize("kind", ["mistral", "mistral+"])
def test_required_in_mistrals_form(kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers[kind]
    plan = planned(tokenizer, tool_choice="required")
    for good in (f"[TOOL_CALLS][{GOOD}]", f"[TOOL_CALLS] [{POINT}, {GOOD}]"):
        assert accepts(tokenizer, plan, good)
    for bad in (f"[{GOOD}]", f"[TOOL_CALLS][{LOOSE}]", "[TOOL_CALLS][]", f"[TOOL_CALLS][{GOOD}] x"):
        assert not accepts(tokenizer, plan, bad), bad


@pytest.mark.parametrize("kind", ["mistral_args", "mistral_args+"])
def test_required_in_mistrals_later_form(kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers[kind]
    plan = planned(tokenizer, tool_choice="required")
    for good in (with_args(GOOD), with_args(POINT, GOOD)):
        assert accepts(tokenizer, plan, good)
    for bad in ("", with_args(LOOSE), "get_weather[ARGS]{}", with_args(GOOD) + " x"):
        assert not accepts(tokenizer, plan, bad), bad


def test_required_in_llamas_form(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers["llama3"]
    plan = planned(tokenizer, tool_choice="required")
    call = GOOD.replace("arguments", "parameters")
    assert accepts(tokenizer, plan, call)
    for bad in (GOOD, f"{call}; {call}", f"Well: {call}"):
        assert not accepts(tokenizer, plan, bad), bad


def test_auto_promises_nothing_unless_asked(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    for asked in ({}, {"tool_choice": "auto"}, {"tool_choice": "auto", "parallel": True}):
        plan = planned(tokenizers["hermes"], **asked)
        assert plan.grammar is None
        assert not plan.forced
        assert plan.names == ("get_weather", "draw-point")
    assert plan_tools(tokenizers["hermes"], TOOLS, tool_choice="none") is None
    assert plan_tools(tokenizers["hermes"], []) is None
    assert plan_tools(tokenizers["hermes"], None, tool_choice="auto") is None


@pytest.mark.parametrize("kind", [*FORMS, *(f"{kind}+" for kind in FORMS)])
def test_auto_with_strict_tools_holds_calls_to_them(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[kind]
    plan = planned(tokenizer, [tool("get_weather", strict=True), tool("draw-point")])
    assert not plan.forced

    def written(*calls: str) -> str:
        if plan.kind == "hermes":
            return hermes(*calls)
        if plan.kind == "mistral":
            return f"[TOOL_CALLS][{', '.join(calls)}]"
        if plan.kind == "mistral_args":
            return with_args(*calls)
        return "; ".join(calls).replace("arguments", "parameters")

    for good in ("", "Hello {world}", "Two\nlines <tool_cal", written(GOOD), written(POINT)):
        assert accepts(tokenizer, plan, good), good
    # Only strict tools have their schema enforced where nothing is forced.
    assert accepts(tokenizer, plan, written(POINT.replace("true", "1")))
    for bad in (written(LOOSE), written(GOOD.replace("get_weather", "other"))):
        assert not accepts(tokenizer, plan, bad), bad
    if plan.kind != "llama3":
        assert accepts(tokenizer, plan, "Let me see.\n" + written(GOOD))
        assert accepts(tokenizer, plan, written(GOOD, POINT))
        one = planned(tokenizer, [tool("get_weather", strict=True), tool("draw-point")], parallel=False)
        assert accepts(tokenizer, one, "Let me see.\n" + written(GOOD))
        assert not accepts(tokenizer, one, written(GOOD, POINT))


@pytest.mark.parametrize("kind", [*FORMS, *(f"{kind}+" for kind in FORMS)])
@pytest.mark.parametrize(
    ("answer", "good", "bad"),
    [
        (GrammarSpec.schema({"type": "integer"}), "42", '"x"'),
        (GrammarSpec("json_object"), '{"name": "Ada"}', "[1]"),
        (GrammarSpec("regex", "a/b[0-9]+"), "a/b12", "ab"),
        (GrammarSpec.one_of(["yes", "nö"]), "nö", "maybe"),
    ],
)
def test_an_answer_is_calls_or_keeps_to_its_format(
    kind: str, answer: GrammarSpec, good: str, bad: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[kind]
    plan = planned(tokenizer, answer=answer)
    call = {
        "hermes": hermes(GOOD),
        "llama3": GOOD.replace("arguments", "parameters"),
        "mistral": f"[TOOL_CALLS][{GOOD}]",
        "mistral_args": with_args(GOOD),
    }[plan.kind]
    assert plan.either
    assert not plan.forced
    assert accepts(tokenizer, plan, good)
    assert accepts(tokenizer, plan, call)
    for wrong in (bad, "", good + call, "Hello"):
        assert not accepts(tokenizer, plan, wrong), wrong
    forced = planned(tokenizer, answer=answer, tool_choice="required")
    assert not accepts(tokenizer, forced, good)
    assert accepts(tokenizer, forced, call)


def test_json_that_is_no_call_is_an_answer_where_calls_are_bare_json(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    tokenizer = tokenizers["llama3"]
    person = {"type": "object", "properties": {"name": {"type": "string"}}, "additionalProperties": False}
    plan = planned(tokenizer, answer=GrammarSpec.schema(person))
    assert accepts(tokenizer, plan, '{"name": "Ada"}')
    assert accepts(tokenizer, plan, '{"name": "get_weather"}')
    point = '{"name": "draw-point", "parameters": {"x": true, "next": {"x": false, "next": null}}}'
    assert parse(point, plan.kind, plan.names)[1]
    assert accepts(tokenizer, plan, point)
    strict = planned(tokenizer, [tool("draw-point", strict=True)], answer=GrammarSpec.schema(person))
    assert accepts(tokenizer, strict, point)
    assert not accepts(tokenizer, strict, point.replace("null", "1"))


def test_a_bad_format_beside_tools_is_refused(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    for answer, said in (
        (GrammarSpec("regex", "a("), "unclosed"),
        (GrammarSpec("lark", 'start: "a"'), "lark: a whole grammar"),
    ):
        with pytest.raises(UserError, match=said):
            plan_tools(tokenizers["hermes"], TOOLS, answer=answer)


def test_strict_false_is_any_object(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers["hermes"]
    plan = planned(tokenizer, [tool("get_weather", strict=False)], tool_choice="required")
    assert accepts(tokenizer, plan, hermes(LOOSE))
    assert not accepts(tokenizer, plan, hermes(LOOSE.replace('{"anything": [1]}', "[1]")))


def test_a_narrower_choice(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers["hermes"]
    chosen = [{"type": "function", "function": {"name": "draw-point"}}]
    for mode, text in (("required", False), ("auto", True)):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": chosen}}
        plan = planned(tokenizer, tool_choice=choice)
        assert accepts(tokenizer, plan, hermes(POINT, POINT))
        assert not accepts(tokenizer, plan, hermes(GOOD))
        assert accepts(tokenizer, plan, "Hello") == text


def test_the_responses_form_of_tools_and_choice(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    flat = [{"type": "function", **one["function"]} for one in TOOLS]
    plan = planned(tokenizers["hermes"], flat, tool_choice={"type": "function", "name": "draw-point"})
    assert accepts(tokenizers["hermes"], plan, hermes(POINT))
    assert not accepts(tokenizers["hermes"], plan, hermes(POINT, POINT))


def test_a_tool_without_parameters(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    bare = {"type": "function", "function": {"name": "now"}}
    for one in (
        bare,
        tool("now", parameters={}),
        tool("now", parameters={"type": "object", "properties": {}}),
    ):
        plan = planned(tokenizers["hermes"], [one], tool_choice="required")
        assert accepts(tokenizers["hermes"], plan, hermes('{"name": "now", "arguments": {}}'))


@pytest.mark.parametrize(
    ("tools", "asked", "said"),
    [
        ([{"type": "web_search"}], {}, r"tools\[0\]\.type"),
        (["f"], {}, r"tools\[0\]\.type"),
        ([tool("a b")], {}, r"tools\[0\]\.function\.name: 'a b'"),
        ([{"type": "function", "function": {}}], {}, r"tools\[0\]\.function\.name: None"),
        ([{"type": "function", "function": 3}], {}, r"tools\[0\]\.function\.name"),
        ([tool("f"), tool("g"), tool("f")], {}, r"tools\[2\]\.function\.name: there are two tools 'f'"),
        ([tool("f", strict="yes")], {}, r"tools\[0\]\.function\.strict: 'yes'"),
        ([tool("f"), tool("g", parameters=[1])], {}, r"tools\[1\]\.function\.parameters"),
        ([tool("f", parameters={"type": "string"})], {}, r"tools\[0\]\.function\.parameters"),
        (
            [tool("f", parameters={"type": "object", "properties": {"a": {"type": "strin"}}})],
            {},
            r"tools\[0\]\.function\.parameters: Invalid type: strin",
        ),
        (
            [tool("f", parameters={"properties": {"a": {"type": "array", "uniqueItems": True}}})],
            {"tool_choice": "required"},
            r"tools\[0\]\.function\.parameters: \$\.properties\.a: not supported: uniqueItems",
        ),
        (
            [tool("f", parameters={"not": {}}, strict=True)],
            {},
            r"tools\[0\]\.function\.parameters: \$: not supp",
        ),
        (TOOLS, {"tool_choice": "always"}, "tool_choice: 'always'"),
        (
            TOOLS,
            {"tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice: 'x' is not among",
        ),
        (TOOLS, {"tool_choice": {"type": "function"}}, "tool_choice: None is not among"),
        (TOOLS, {"tool_choice": {"type": "mcp"}}, "tool_choice: "),
        (TOOLS, {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, "allowed_tools"),
        ([], {"tool_choice": "required"}, "there are no tools"),
    ],
)
def test_what_is_not_possible_is_refused_by_its_place(
    tools: list[Any], asked: dict[str, Any], said: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    with pytest.raises(UserError, match=said):
        plan_tools(tokenizers["hermes"], tools, **asked)


def test_keywords_that_nothing_enforces_pass_where_nothing_is_promised(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    loose = [tool("f", parameters={"type": "object", "dependentRequired": {"a": ["b"]}, "oneOf": [{}, {}]})]
    assert planned(tokenizers["hermes"], loose).grammar is None
    strict_false = [tool("f", strict=False, parameters=loose[0]["function"]["parameters"])]
    assert planned(tokenizers["hermes"], strict_false, tool_choice="required").grammar is not None


def test_the_grammar_is_plain_data_that_compiles(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    plan = planned(tokenizers["mistral+"], tool_choice="required")
    assert plan.grammar is not None
    again = GrammarSpec(plan.grammar.kind, plan.grammar.text)
    assert again == plan.grammar
    grammars_of(tokenizers["mistral+"]).check(again)
    assert plan.marker_ids == {tokenizers["mistral+"].convert_tokens_to_ids("[TOOL_CALLS]")}
