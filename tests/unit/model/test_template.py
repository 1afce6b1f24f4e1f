"""Rendering and labels: against transformers' own rendering, and a slow reference that tokenises every prefix."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.unit.model import chat_templates as templates
from tests.unit.model.chat_templates import CALL, TOOL, assistant, learned, rendered, user, with_template
from tunesmith.model.batch import IGNORE
from tunesmith.model.template import (
    TemplateError,
    encode_dialogue,
    encode_prompt,
    encode_text,
    stop_token_ids,
    template_hash,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "chat_tokens.json"


def reference_labels(tokenizer: PreTrainedTokenizerBase, messages: list[Any]) -> list[int] | None:
    """Labels by tokenising every prefix; None where a prompt's ids do not begin the whole's."""
    whole = rendered(tokenizer, messages)
    labels = [IGNORE] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = rendered(tokenizer, messages[:i], add_generation_prompt=True)
        if whole[: len(before)] != before:
            return None
        end = next(t for t in range(len(before), len(whole)) if whole[t] in stop_token_ids(tokenizer)) + 1
        labels[len(before) : end] = whole[len(before) : end]
    return labels


# -- golden tokens ----------------------------------------------------------------------------------


def golden_cases() -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in json.loads(GOLDEN.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("case", golden_cases())
def test_golden_ids_and_labels(case: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Each token of the golden file is [id, text, supervised], so that a person can check it by reading."""
    if case["template"] != "smollm2":
        tokenizer.chat_template = getattr(templates, case["template"])
    encoded = encode_dialogue(tokenizer, case["messages"], case["tools"])
    found = [
        [i, tokenizer.decode([i]), label != IGNORE]
        for i, label in zip(encoded.ids, encoded.labels, strict=True)
    ]
    assert found == case["tokens"]
    assert all(label in (i, IGNORE) for i, label in zip(encoded.ids, encoded.labels, strict=True))


# -- against the reference --------------------------------------------------------------------------

PIECES = [
    "Hello", " world", "\n", "\n\n", "  ", "\t", "", "naïve", "数据", "🙂👩‍👩‍👧", "assistant", "user\n", "<|", "|>", "im_en",
    "12345", "'s", "\r\n", "{{ x }}", "{% if %}", "\u00a0", "e\u0301", " .", "<think>", "]", "[INST]",
]  # fmt: skip


def random_dialogue(chance: random.Random, *, trims: bool) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for _ in range(chance.randint(1, 4)):
        for role in ("user", "assistant"):
            content = "".join(chance.choices(PIECES, k=chance.randint(1, 6)))
            turns.append({"role": role, "content": content.strip() or "x" if trims else content})
    return turns


@pytest.mark.parametrize("template", [None, "CHATML_TOOLS", "EOS_LAST"])
def test_random_dialogues_equal_the_reference(
    tokenizer: PreTrainedTokenizerBase, template: str | None
) -> None:
    if template:
        tokenizer.chat_template = getattr(templates, template)
    chance = random.Random(str(template))
    clean = 0
    for _ in range(300):
        messages = random_dialogue(chance, trims=False)
        encoded = encode_dialogue(tokenizer, messages)
        assert encoded.ids == rendered(tokenizer, messages)
        expected = reference_labels(tokenizer, messages)
        if expected is not None:
            clean += 1
            assert (encoded.labels, encoded.straddled, encoded.unmatched) == (expected, 0, 0)
        else:
            assert encoded.straddled + encoded.unmatched > 0
        for text, answer in zip(learned(tokenizer, encoded), answers_of(messages), strict=False):
            if encoded.unmatched == 0:
                assert (answer + "<|im_end|>").endswith(text)
    assert clean > 100


def answers_of(messages: list[dict[str, Any]]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant"]


@pytest.mark.parametrize(
    ("scheme", "legacy"), [("first", False), ("always", False), ("never", False), ("", True)]
)
def test_sentencepiece_like_tokenizers_equal_the_reference(scheme: str, legacy: bool) -> None:
    tokenizer = templates.metaspace_tokenizer(scheme, legacy=legacy)
    chance = random.Random(scheme)
    for _ in range(100):
        messages = random_dialogue(chance, trims=True)
        encoded = encode_dialogue(tokenizer, messages)
        assert encoded.ids == rendered(tokenizer, messages)
        expected = reference_labels(tokenizer, messages)
        # Without a pre-tokenizer the old kind merges "]" of the prompt with the space of the answer.
        assert encoded.straddled > 0 if expected is None else encoded.labels == expected
        assert expected is not None or legacy
        assert encoded.ids.count(tokenizer.bos_token_id) == len(answers_of(messages))


def test_the_prompt_is_what_the_answer_follows(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]
    whole = encode_dialogue(tokenizer, messages)
    for i in (1, 3):
        prompt = encode_prompt(tokenizer, messages[:i])
        assert prompt == rendered(tokenizer, messages[:i], add_generation_prompt=True)
        assert whole.ids[: len(prompt)] == prompt
        assert whole.labels[len(prompt) - 1] == IGNORE
        assert whole.labels[len(prompt)] == whole.ids[len(prompt)]


def test_a_first_token_merged_with_the_prompt_is_counted_and_not_learned(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoded = encode_dialogue(tokenizer, [user("x"), assistant("\n\nhello there")])
    assert encoded.ids == rendered(tokenizer, [user("x"), assistant("\n\nhello there")])
    assert encoded.straddled == 1
    assert learned(tokenizer, encoded) == ["\nhello there<|im_end|>"]


def test_weight_zero_is_context_only(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [user("a"), assistant("one", weight=0), user("b"), assistant("two")]
    encoded = encode_dialogue(tokenizer, messages)
    assert learned(tokenizer, encoded) == ["two<|im_end|>"]
    assert encoded.ids == rendered(
        tokenizer, [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    )


# -- templates of other kinds -----------------------------------------------------------------------


def test_bos_that_the_template_writes_is_not_doubled() -> None:
    tokenizer = templates.metaspace_tokenizer("first")
    assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id
    encoded = encode_dialogue(tokenizer, [user("hello"), assistant("you")])
    assert encoded.ids.count(tokenizer.bos_token_id) == 1
    assert encoded.labels[-1] == tokenizer.eos_token_id


def test_end_of_sequence_after_the_conversation_is_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    with_template(tokenizer, templates.EOS_LAST)
    encoded = encode_dialogue(tokenizer, [user("a"), assistant("one"), user("b"), assistant("two")])
    assert learned(tokenizer, encoded) == ["one<|im_end|>", "two<|im_end|>"]
    assert encoded.ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert encoded.labels[-1] == IGNORE


def test_reasoning_that_history_loses_is_counted_and_not_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    with_template(tokenizer, templates.CHATML_THINK)
    messages = [user("a"), assistant("one"), user("b"), assistant("two", reasoning_content="hm")]
    encoded = encode_dialogue(tokenizer, messages)
    assert (encoded.answers, encoded.unmatched) == (2, 1)
    assert learned(tokenizer, encoded) == ["<think>\nhm\n</think>\n\ntwo<|im_end|>"]


def test_a_prompt_that_no_conversation_has_gives_nothing_to_learn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    templates.with_tokens(tokenizer, "<User>", "<Assistant>", "<think>", "</think>")
    with_template(tokenizer, templates.OPENED_THINK)
    encoded = encode_dialogue(tokenizer, [user("a"), assistant("<think>\nhm\n</think>\n\none")])
    assert (encoded.unmatched, set(encoded.labels)) == (1, {IGNORE})


def test_without_a_stop_token_the_last_answer_gets_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    with_template(tokenizer, templates.NO_STOP)
    encoded = encode_dialogue(tokenizer, [user("a"), assistant("one"), user("b"), assistant("two")])
    assert encoded.ids[-1] == encoded.labels[-1] == tokenizer.eos_token_id
    assert encoded.without_stop == 1
    assert encoded.ids[:-1] == rendered(tokenizer, [user("a"), assistant("one"), user("b"), assistant("two")])


def test_no_template_is_an_error_with_a_remedy(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="no chat template") as caught:
        encode_prompt(tokenizer, [user("a")])
    assert "model.chat_template" in (caught.value.hint or "")


def test_a_refusal_of_the_template_is_told() -> None:
    tokenizer = templates.metaspace_tokenizer("first")
    with pytest.raises(TemplateError, match="a system message"):
        encode_prompt(tokenizer, [{"role": "system", "content": "s"}, user("a")])


# -- tools ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "tools", "part"),
    [
        ([user("a")], [TOOL], "tool definitions"),
        ([user("a"), assistant("", tool_calls=[CALL])], None, "tool calls"),
        ([user("a"), assistant("b", reasoning_content="why")], None, "reasoning"),
    ],
)
def test_what_the_template_would_lose_is_refused(
    tokenizer: PreTrainedTokenizerBase, messages: list[Any], tools: Any, part: str
) -> None:
    with pytest.raises(TemplateError, match=f"no place for {part}"):
        encode_dialogue(tokenizer, messages, tools)


def test_tool_calls_are_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    with_template(tokenizer, templates.CHATML_TOOLS)
    messages = [
        user("1+2?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "content": "3"},
        assistant("It is 3."),
    ]
    encoded = encode_dialogue(tokenizer, messages, [TOOL])
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call><|im_end|>'
    assert learned(tokenizer, encoded) == [call, "It is 3.<|im_end|>"]


def test_arguments_as_text_and_as_object_are_the_same(tokenizer: PreTrainedTokenizerBase) -> None:
    with_template(tokenizer, templates.CHATML_TOOLS)
    as_object = copy.deepcopy(CALL)
    as_object["function"]["arguments"] = {"a": 1, "b": 2}
    first, second = (
        encode_dialogue(tokenizer, [user("x"), assistant("", tool_calls=[c])], [TOOL["function"]])
        for c in (CALL, as_object)
    )
    assert first == second


# -- stops, hashes, text ----------------------------------------------------------------------------


def test_stop_ids_are_the_templates_then_the_tokenizers_then_the_models(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert stop_token_ids(tokenizer) == (2,)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    with_template(tokenizer, templates.CHATML_TOOLS)
    assert stop_token_ids(tokenizer) == (2, 0)
    assert stop_token_ids(tokenizer, SimpleNamespace(eos_token_id=[0, 9])) == (2, 0, 9)
    encoded = encode_dialogue(tokenizer, [user("a"), assistant("b")])
    assert learned(tokenizer, encoded) == ["b<|im_end|>"]


def test_template_hash_follows_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    before = template_hash(tokenizer)
    assert before == template_hash(copy.deepcopy(tokenizer))
    assert template_hash(with_template(tokenizer, templates.EOS_LAST)) != before


def test_a_changed_template_is_used_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    first = encode_prompt(tokenizer, [user("a")])
    second = encode_prompt(with_template(tokenizer, templates.CHATML_TOOLS), [user("a")])
    assert second == rendered(tokenizer, [user("a")], add_generation_prompt=True) != first


def test_text_is_learned_whole_and_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_text(tokenizer, "Once upon a time")
    assert encoded.ids == [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]
    assert encoded.labels == [IGNORE, *encoded.ids[1:]]


def test_text_begins_as_the_tokenizer_begins_it() -> None:
    tokenizer = templates.metaspace_tokenizer("first")
    encoded = encode_text(tokenizer, "the fox</s>")
    assert encoded.ids[0] == tokenizer.bos_token_id
    assert encoded.ids.count(tokenizer.eos_token_id) == 1
    assert encoded.labels == [IGNORE, *encoded.ids[1:]]
