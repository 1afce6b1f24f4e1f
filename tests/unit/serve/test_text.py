"""Text as it comes: stop strings and characters are never cut."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tunesmith.model.requests import Logprobs, TokenEvent
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.serve.text import Answer, Detokenizer, StopMatcher, TextStream
from tunesmith.serve.tool_calls import ToolParser

TEXTS = [
    "plain words, and some more",
    "naïve café: 中文字符測試 🙂🙃👩‍👩‍👧 end",
    '{"a": [1, 2],\n\t\'b\': "é"}',
    "  leading and   double spaces  ",
    "🙂",
]


@pytest.fixture(scope="module")
def detokenizer(smol: Path) -> Detokenizer:
    return Detokenizer(load_tokenizer(smol))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_no_half_character(detokenizer: Detokenizer, text: str) -> None:
    ids = detokenizer.tokenizer(text).input_ids
    stream = TextStream(detokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("�" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_given_out_once(detokenizer: Detokenizer) -> None:
    ids = detokenizer.tokenizer("a🙂").input_ids[:-1]
    stream = TextStream(detokenizer)
    given = "".join(stream.push(token) for token in ids) + stream.finish()
    assert given == detokenizer.decode(ids)
    assert stream.finish() == ""


def test_special_tokens_are_not_text(detokenizer: Detokenizer) -> None:
    end = detokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stream = TextStream(detokenizer)
    assert [stream.push(t) for t in [*detokenizer.tokenizer("hi").input_ids, end]] == ["hi", ""]


def cut_by_hand(text: str, stops: list[str]) -> tuple[str, bool]:
    """Up to the stop string that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_stop_matcher_equals_searching_the_whole_text() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choice("ab\n") for _ in range(draw.randint(0, 20)))
        stops = [
            "".join(draw.choice("ab\n") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(1, 4))
        ]
        matcher, given, stopped, at = StopMatcher(stops), "", False, 0
        while at < len(text) and not stopped:
            step = draw.randint(1, 4)
            new, stopped = matcher.push(text[at : at + step])
            given, at = given + new, at + step
            assert cut_by_hand(text, stops)[0].startswith(given), (text, stops)
        given += "" if stopped else matcher.finish()
        assert (given, stopped) == cut_by_hand(text, stops), (text, stops)


def test_stop_matcher_gives_out_at_once_what_cannot_be_a_stop() -> None:
    matcher = StopMatcher(["###"])
    assert matcher.push("ab#") == ("ab", False)
    assert matcher.push("c##") == ("#c", False)
    assert matcher.push("#d") == ("", True)


def events(ids: list[int], last: str = "length") -> list[TokenEvent]:
    done = [None] * (len(ids) - 1) + [last]
    return [
        TokenEvent(0, token, reason, Logprobs(token, -1.0, ()))  # type: ignore[arg-type]
        for token, reason in zip(ids, done, strict=True)
    ]


def test_answer_stops_across_tokens_and_drops_the_tokens_after(detokenizer: Detokenizer) -> None:
    ids = detokenizer.tokenizer("one two three four").input_ids
    answer = Answer(detokenizer, stops=["o thr"])
    pieces = []
    for event in events(ids):
        pieces.append(answer.push(event))
        if answer.finish_reason:
            break
    assert "".join(piece.text for piece in pieces) == "one tw"
    assert answer.finish_reason == "stop"
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [detokenizer.piece(token.token_id)[0] for token in tokens] == ["one", " two"]
    assert [token.offset for token in tokens] == [0, 3]


def test_answer_gives_back_what_only_looked_like_a_stop(detokenizer: Detokenizer) -> None:
    ids = detokenizer.tokenizer("wait for it #").input_ids
    answer = Answer(detokenizer, stops=["##"])
    pieces = [answer.push(event) for event in events(ids)]
    assert "".join(piece.text for piece in pieces) == "wait for it #"
    assert pieces[-1].finish_reason == "length"
    assert sum(len(piece.tokens) for piece in pieces) == len(ids)


def test_answer_counts_the_stop_token_but_does_not_show_it(detokenizer: Detokenizer) -> None:
    ids = [*detokenizer.tokenizer("yes").input_ids, 2]
    answer = Answer(detokenizer, stop_ids=[2])
    pieces = [answer.push(event) for event in events(ids, "stop")]
    assert ("".join(p.text for p in pieces), answer.num_tokens) == ("yes", 2)
    assert pieces[-1].finish_reason == "stop"


def test_token_bytes_of_half_a_character(detokenizer: Detokenizer) -> None:
    ids = detokenizer.tokenizer("🙂中").input_ids
    data = [byte for token in ids for byte in detokenizer.piece(token)[1]]
    assert bytes(data) == "🙂中".encode()


def test_kept_special_tokens_are_text_for_the_reader_of_calls(detokenizer: Detokenizer) -> None:
    start = detokenizer.tokenizer.convert_tokens_to_ids("<|im_start|>")
    words = detokenizer.tokenizer("a<|im_start|>b<repo_name>c").input_ids
    plain, keeping = Answer(detokenizer), Answer(detokenizer, kept=frozenset({start}))
    texts = ["".join(answer.push(event).text for event in events(words)) for answer in (plain, keeping)]
    assert texts == ["abc", "a<|im_start|>bc"]


def test_calls_are_taken_out_of_the_text_and_change_how_it_ended(detokenizer: Detokenizer) -> None:
    text = 'So:\n<tool_call>\n{"name": "f", "arguments": {"a": "é🙂"}}\n</tool_call>'
    answer = Answer(detokenizer, stop_ids=[2], calls=ToolParser("hermes", ["f"]))
    pieces = [answer.push(event) for event in events([*detokenizer.tokenizer(text).input_ids, 2], "stop")]
    assert "".join(piece.text for piece in pieces) == "So:"
    calls = [call for piece in pieces for call in piece.calls]
    assert calls[0].name == "f"
    assert json.loads("".join(call.arguments for call in calls)) == {"a": "é🙂"}
    assert pieces[-1].finish_reason == answer.finish_reason == "tool_calls"


def test_mean_logprob_counts_every_token_with_the_stop_token(detokenizer: Detokenizer) -> None:
    answer = Answer(detokenizer, stop_ids=[2])
    assert answer.mean_logprob == 0.0
    for place, token in enumerate([5, 6, 2]):
        answer.push(TokenEvent(0, token, "stop" if token == 2 else None, Logprobs(token, -float(place), ())))
    assert answer.mean_logprob == -1.0
