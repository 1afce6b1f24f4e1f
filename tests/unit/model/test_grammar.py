"""Grammars on a real tokenizer: what they let through, what they refuse, and why."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jsonschema
import pytest
from transformers import PreTrainedTokenizerBase

from tests.random_answers import RandomSchema, random_answers
from tunesmith.core.errors import UserError
from tunesmith.model import grammar
from tunesmith.model.grammar import Grammars, GrammarSpec, Matcher
from tunesmith.model.sampling import forbidden

VOCAB = 49152
EOS = 2


@pytest.fixture(scope="module")
def grammars(smol_tokenizer: PreTrainedTokenizerBase) -> Grammars:
    return Grammars(smol_tokenizer, VOCAB, (EOS,))


def allowed(matcher: Matcher) -> list[int]:
    return (~forbidden([matcher], VOCAB)[0]).nonzero()[:, 0].tolist()


def follow(grammars: Grammars, spec: GrammarSpec, text: str, tokenizer: Any) -> Matcher | None:
    """The matcher after `text`; None where it does not take it."""
    matcher = grammars.matcher(spec)
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        if not matcher.advance(token):
            return None
    return matcher


def accepts(grammars: Grammars, spec: GrammarSpec, text: str, tokenizer: Any) -> bool:
    matcher = follow(grammars, spec, text, tokenizer)
    return matcher is not None and matcher.may_end


@pytest.mark.parametrize("seed", range(28))
def test_random_answers_are_valid_by_their_random_schema(
    seed: int, grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    schema = RandomSchema(seed).object() if seed % 4 else RandomSchema(seed).make()
    ended = [
        text
        for text in random_answers(
            grammars, GrammarSpec.schema(schema), smol_tokenizer, range(seed, seed + 3)
        )
        if text is not None
    ]
    assert ended
    for text in ended:
        jsonschema.validate(
            json.loads(text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )


def test_a_recursive_schema(grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase) -> None:
    node = {
        "type": "object",
        "properties": {
            "v": {"enum": [1, 2]},
            "next": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
        },
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    ended = [
        text
        for text in random_answers(grammars, GrammarSpec.schema(schema), smol_tokenizer, range(6))
        if text
    ]
    assert len(ended) >= 4
    for text in ended:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize(
    "pattern", [r"[a-c]{2,5}", r"(yes|no)( sir)?", r"\d{4}-\d\d-\d\d", r"ä+ö?", r"a/b\\c\n", r"^fixed$"]
)
def test_random_answers_match_their_regex(
    pattern: str, grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    for text in random_answers(grammars, GrammarSpec("regex", pattern), smol_tokenizer, range(8)):
        assert text is not None
        assert re.fullmatch(pattern, text), text


def test_random_answers_are_among_the_choices(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    choices = ["yes", "yes, but", "No!", "vielleicht ß", "🙂", 'a "quote"', "two\nlines", "back\\slash"]
    got = random_answers(grammars, GrammarSpec.one_of(choices), smol_tokenizer, range(40))
    assert set(got) <= set(choices)
    assert len(set(got)) > 4


def test_json_object_takes_objects_as_they_are_written(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    spec = GrammarSpec("json_object")
    value = {"a": [1, -2.5e3, {"b": None}], "ü": 'x\n"y"'}
    for text in (
        json.dumps(value, ensure_ascii=False),
        json.dumps(value, ensure_ascii=False, separators=(",", ":")),
        json.dumps(value, ensure_ascii=False, indent=4),
        json.dumps(value, ensure_ascii=False, indent="\t"),
    ):
        assert accepts(grammars, spec, text, smol_tokenizer), text
    for text in ("[1]", '{"a": 1', '{"a":1} ', "{'a': 1}", '{\n\n"a": 1}', '{     "a": 1}'):
        assert not accepts(grammars, spec, text, smol_tokenizer), text


def test_lark(grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase) -> None:
    spec = GrammarSpec("lark", 'start: "f(" %json {"type": "integer"} ("," %json {"type": "boolean"})* ")"')
    assert accepts(grammars, spec, "f(12,true,false)", smol_tokenizer)
    assert not accepts(grammars, spec, "f(12,3)", smol_tokenizer)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (GrammarSpec("json_schema", '{"type": "strin"}'), "json_schema: Invalid type: strin"),
        (GrammarSpec("json_schema", '{"type": "object"'), "is not JSON"),
        (GrammarSpec("json_schema", "[1]"), "is not a schema"),
        (GrammarSpec.schema({"type": "integer", "minimum": 5, "maximum": 3}), r"minimum \(5\) is greater"),
        (GrammarSpec.schema({"$ref": "#/$defs/none"}), "/none' does not exist"),
        (GrammarSpec.schema({"$ref": "http://example.com/x.json"}), "example.com"),
        (GrammarSpec.schema({"type": "string", "format": "shoe-size"}), "Unknown format: shoe-size"),
        (GrammarSpec.schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (GrammarSpec.schema({"enum": []}), "Unsatisfiable"),
        (
            GrammarSpec.schema({"properties": {"a": {"items": [{"not": {}}, {"uniqueItems": True}]}}}),
            r"\$\.properties\.a\.items",
        ),
        (GrammarSpec.schema({"anyOf": [{}, {"uniqueItems": True}]}), r"\$\.anyOf\[1\]: .*uniqueItems"),
        (GrammarSpec.schema({"x-guidance": {"lenient": True}, "not": {}}), "not supported: not"),
        (
            GrammarSpec.schema({"oneOf": [{"type": "string"}, {"minLength": 3}]}),
            r"\$: the members of oneOf overlap[\s\S]*anyOf",
        ),
        (GrammarSpec.schema({"items": {"multipleOf": 99991}}), r"\$\.items: multipleOf 99991 is too large"),
        (
            GrammarSpec.schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 99.1}]}),
            "multipleOf 99.1 is too",
        ),
        (GrammarSpec("json_schema", '{"items": ' * 150 + "{}" + "}" * 150), "more than 100 levels deep"),
        (GrammarSpec("json_schema", "[" * 100_000), "more than 100 levels deep"),
        (GrammarSpec("json_schema", '{"const": "\\ud800"}'), "half of a surrogate pair"),
        (GrammarSpec("json_schema", '{"maximum": Infinity}'), "is not JSON"),
        (GrammarSpec("choice", '["a", "\\ud800"]'), "half of a surrogate pair"),
        (GrammarSpec("regex", "\ud800"), "half of a surrogate pair"),
        (GrammarSpec("regex", "a("), r"regex: 'a\(': unclosed group"),
        (GrammarSpec("regex", r"(a)\1"), "backreferences are not supported"),
        (GrammarSpec("choice", "[]"), "is not a list of strings"),
        (GrammarSpec("choice", '["a", 3]'), "is not a list of strings"),
        (GrammarSpec("lark", "start: nothing"), 'unknown name: "nothing"'),
        (GrammarSpec("lark", 'begin: "a"'), "no start rule"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_reason(
    spec: GrammarSpec, said: str, grammars: Grammars
) -> None:
    for refuse in (grammars.check, grammars.matcher, grammar.check):
        with pytest.raises(UserError, match=said):
            refuse(spec)


MANY_OBJECTS = [
    {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(j)}} for j in range(100)
]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (GrammarSpec.schema({"$ref": "#"}), "json_schema: no answer can match it"),
        (GrammarSpec("lark", "start: start"), "lark: 'start: start': no answer can match it"),
        (GrammarSpec.schema({"anyOf": MANY_OBJECTS}), "json_schema: parser error: Too many items"),
    ],
)
def test_what_shows_only_at_the_first_token_is_refused_too(
    spec: GrammarSpec, said: str, grammars: Grammars
) -> None:
    with pytest.raises(UserError, match=said):
        grammars.check(spec)


def test_many_choices(grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase) -> None:
    spec = GrammarSpec.one_of([f"value {i}" for i in range(5000)] + [""])
    assert accepts(grammars, spec, "value 4999", smol_tokenizer)
    assert accepts(grammars, spec, "", smol_tokenizer)
    assert not accepts(grammars, spec, "value 5000", smol_tokenizer)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"if": {"type": "string"}, "then": {"minLength": 3}},
        {"contains": {"type": "string"}},
        {"propertyNames": {"pattern": "a"}},
        {"unevaluatedProperties": False},
        {"$dynamicRef": "#a"},
    ],
)
def test_no_keyword_that_asserts_something_is_ignored(schema: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not supported"):
        grammar.check(GrammarSpec.schema(schema))
    grammar.check(GrammarSpec.schema(schema), lenient=True)


def test_lenient_still_refuses_what_is_no_schema() -> None:
    for schema in ({"type": "strin"}, {"properties": 5}, {"$ref": "#/nowhere"}):
        with pytest.raises(UserError):
            grammar.check(GrammarSpec.schema(schema), lenient=True)


def test_stop_tokens_only_where_the_grammar_may_end(
    grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    spec = GrammarSpec("regex", "ab*")
    start = grammars.matcher(spec)
    assert not start.may_end
    assert EOS not in allowed(start)
    open_end = follow(grammars, spec, "ab", smol_tokenizer)
    assert open_end is not None
    assert open_end.may_end
    assert not open_end.is_done
    assert EOS in allowed(open_end)
    done = follow(grammars, GrammarSpec("regex", "ab"), "ab", smol_tokenizer)
    assert done is not None
    assert done.is_done
    assert allowed(done) == [EOS]


def test_a_token_that_does_not_fit_fails_the_matcher_for_good(grammars: Grammars) -> None:
    matcher = grammars.matcher(GrammarSpec("regex", "[0-9]+"))
    digit = allowed(matcher)[0]
    assert not matcher.advance(EOS + 1)
    assert matcher.failed
    assert not matcher.is_done
    assert not matcher.advance(digit)
    assert allowed(matcher) == []


def test_ids_beyond_the_tokenizer_are_never_allowed(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    wide = Grammars(smol_tokenizer, VOCAB + 77, (EOS,))
    wide.prepare()
    mask = forbidden([wide.matcher(GrammarSpec("regex", r"(.|\n)*"))], VOCAB + 77)
    assert mask.shape == (1, VOCAB + 77)
    assert mask[0, VOCAB:].all()
    assert not mask[0, EOS]


def test_a_head_smaller_than_the_tokenizer(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    narrow = Grammars(smol_tokenizer, 1000, (EOS,))
    mask = forbidden([narrow.matcher(GrammarSpec("regex", "[0-9]+"))] * 2, 1000)
    assert mask.shape == (2, 1000)
    digits = [i for i in range(1000) if smol_tokenizer.decode([i]).isdigit()]
    assert (~mask[0]).nonzero()[:, 0].tolist() == digits


def test_special_tokens_are_no_text(grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase) -> None:
    free = grammars.matcher(GrammarSpec("regex", r"(.|\n)*"))
    assert not set(smol_tokenizer.all_special_ids) - {EOS} & set(allowed(free))


def test_the_cache_is_bounded_and_keeps_what_is_used(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    grammars = Grammars(smol_tokenizer, VOCAB, (EOS,), kept=2)
    first, second, third = (GrammarSpec("regex", letter) for letter in "abc")
    grammars.check(first)
    grammars.check(second)
    kept = grammars._compiled[first]
    grammars.matcher(first)
    grammars.check(third)
    assert set(grammars._compiled) == {first, third}
    assert grammars._compiled[first] is kept


def test_large_grammars_are_not_kept_in_number(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    grammars = Grammars(smol_tokenizer, VOCAB, (EOS,))
    for number in range(3):
        title = str(number) * 400_000
        grammars.check(GrammarSpec.schema({"title": title, "type": "null"}))
    assert len(grammars._compiled) == 2


def test_answers_do_not_share_a_place(grammars: Grammars, smol_tokenizer: PreTrainedTokenizerBase) -> None:
    spec = GrammarSpec("regex", "abc|xyz")
    one, other = grammars.matcher(spec), grammars.matcher(spec)
    assert one.advance(smol_tokenizer("a").input_ids[0])
    assert not one.may_end
    assert other.advance(smol_tokenizer("x").input_ids[0])
    assert smol_tokenizer("x").input_ids[0] in allowed(grammars.matcher(spec))


def test_threads_compile_together(smol_tokenizer: PreTrainedTokenizerBase) -> None:
    grammars = Grammars(smol_tokenizer, VOCAB, (EOS,), kept=8)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(20):
                matcher = grammars.matcher(GrammarSpec("regex", f"{(number + i) % 12}x"))
                assert matcher.advance(smol_tokenizer(str((number + i) % 12)).input_ids[0])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(grammars._compiled) <= 8


def test_without_the_library_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, smol_tokenizer: PreTrainedTokenizerBase
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    grammar.llguidance.cache_clear()
    monkeypatch.setattr(grammar.optional, "load", missing)
    with pytest.raises(UserError, match="llguidance") as error:
        Grammars(smol_tokenizer, VOCAB, (EOS,)).check(GrammarSpec("json_object"))
    assert "tunesmith[serve]" in str(error.value)
    monkeypatch.undo()
    grammar.llguidance.cache_clear()
