"""What xtuner 0.1 makes of a row, piece by piece: golden rows and the traps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tunesmith.convert.xtuner_turns import Turn, begin_end_ids, encode_rows, turns_of
from tunesmith.core.errors import UserError
from tunesmith.recipe.compat import Template
from tunesmith.recipe.schema import Source

ALPACA = Source(path="x", format="alpaca")


class Qwen2TokenizerFast(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Named as xtuner knows it: no begin token."""


@pytest.fixture(scope="module")
def tokenizer(smol: Path) -> PreTrainedTokenizerFast:
    return Qwen2TokenizerFast.from_pretrained(smol)


def pieces(tokenizer: Any, turns: list[Turn], template: Template | None = None) -> list[tuple[str, bool]]:
    """The row as runs of text that are learned or not."""
    ids, learned = encode_rows([turns], template or Template(), tokenizer)[0]
    runs: list[tuple[list[int], bool]] = []
    for token, mask in zip(ids, learned, strict=True):
        if runs and runs[-1][1] == mask:
            runs[-1][0].append(token)
        else:
            runs.append(([token], mask))
    return [(tokenizer.decode(tokens), mask) for tokens, mask in runs]


def test_golden_row(tokenizer: Any) -> None:
    turns = turns_of({"instruction": "I", "input": "", "output": "O"}, ALPACA)
    assert turns == [Turn("I\n", "O")]  # the newline stands there without an input too
    assert pieces(tokenizer, turns) == [
        ("<|im_start|>user\nI\n<|im_end|>\n<|im_start|>assistant\n", False),
        ("O<|im_end|>", True),
        ("\n", False),
    ]


def test_pieces_are_tokenised_apart(tokenizer: Any) -> None:
    template = Template(system="", instruction="{input}", suffix="", suffix_as_eos=True, sep="")
    ids, _ = encode_rows([[Turn("hel", "lo")]], template, tokenizer)[0]
    apart = [tokenizer.encode(part, add_special_tokens=False) for part in ("hel", "lo")]
    assert ids == apart[0] + apart[1] != tokenizer.encode("hello", add_special_tokens=False)


def test_all_answers_of_a_conversation_are_learned(tokenizer: Any) -> None:
    found = pieces(tokenizer, [Turn("a", "b", "S"), Turn("c", "d", learned=False)])
    assert [text for text, learned in found if learned] == ["b<|im_end|>"]
    assert found[0][0].startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>")


def test_an_end_token_follows_a_template_whose_suffix_ends_nothing(tokenizer: Any) -> None:
    template = Template(system="", instruction="Q{input}A", suffix="", suffix_as_eos=False, sep="\n")
    end = tokenizer.eos_token
    assert pieces(tokenizer, [Turn("x", "y")], template) == [("QxA", False), (f"y{end}", True), ("\n", False)]


def test_begin_token_before_a_row_and_after_every_end_token_but_not_for_qwen(
    smol: Path, tokenizer: Any
) -> None:
    plain = AutoTokenizer.from_pretrained(smol)
    assert begin_end_ids(plain) == ([plain.bos_token_id], [plain.eos_token_id])
    assert begin_end_ids(tokenizer) == ([], [tokenizer.eos_token_id])
    turns = [Turn("x", "y"), Turn("z", "w")]
    chatml, _ = encode_rows([turns], Template(), plain)[0]
    ended = Template(system="", instruction="{input}", suffix="", suffix_as_eos=False, sep="")
    ids, _ = encode_rows([turns], ended, plain)[0]
    bare, _ = encode_rows([turns], Template(), tokenizer)[0]
    assert chatml == [plain.bos_token_id, *bare]
    assert ids.count(plain.bos_token_id) == 2


def test_rounds_are_counted_from_one(tokenizer: Any) -> None:
    template = Template(system="", instruction="[{round}]{input}", suffix="", suffix_as_eos=True, sep="")
    found = "".join(text for text, _ in pieces(tokenizer, [Turn("a", "b"), Turn("c", "d")], template))
    assert found == "[1]ab[2]cd"


def test_nooutput_is_dropped_by_alpaca_map_fn_alone_and_an_empty_output_is_kept() -> None:
    row = {"instruction": "I", "input": "x", "output": "<nooutput>"}
    assert turns_of(row, ALPACA) == []
    assert turns_of(row | {"output": ""}, ALPACA) == [Turn("I\nx", "")]
    chinese = Source(
        path="x", format="alpaca", columns={"instruction": "i", "input": "n", "output": "o"}
    )  # alpaca_zh_map_fn does not look
    assert turns_of({"i": "I", "n": "x", "o": "<nooutput>"}, chinese) == [Turn("I\nx", "<nooutput>")]


def test_other_map_functions() -> None:
    chat = [
        {"role": "assistant", "content": "skipped"},
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    assert turns_of({"messages": chat}, Source(path="x", format="messages")) == [
        Turn("ab", "c", "S"),
        Turn("d", "e"),
    ]
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert turns_of({"conversations": said}, Source(path="x", format="sharegpt")) == [Turn("a", "b")]
    text = {"text": "### Human: a### Assistant: b### Human: c"}
    assert turns_of(text, Source(path="x", format="guanaco")) == [Turn("a", "b")]
    assert turns_of({"text": " a "}, Source(path="x", format="text")) == [Turn("", "a")]
    own = {"conversation": [{"input": "a", "output": "b", "system": "S", "output_with_loss": False}]}
    assert turns_of(own, Source(path="x", format="turns")) == [Turn("a", "b", "S", learned=False)]
    paired = Source(path="x", format="prompt_completion", columns={"prompt": "q"}, system="S")
    assert turns_of({"q": "a", "completion": "b"}, paired) == [Turn("a", "b", "S")]


def test_what_xtuner_stops_at() -> None:
    with pytest.raises(UserError, match="has no column 'input'"):
        turns_of({"instruction": "I", "output": "O"}, ALPACA)
    with pytest.raises(UserError, match="the role 'tool'"):
        turns_of({"messages": [{"role": "tool", "content": "x"}]}, Source(path="x", format="messages"))
    with pytest.raises(UserError, match="format 'moss' are not reproduced"):
        turns_of({}, Source(path="x", format="moss"))
