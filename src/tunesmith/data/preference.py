"""Rows with two answers to one prompt: what they mean, and how they are laid end to end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tunesmith.data.dialogue import (
    Cells,
    Dialogue,
    RowError,
    dialogue,
    history,
    instruction,
    json_list,
    shown,
    spelled,
    turns,
)
from tunesmith.model.batch import IGNORE
from tunesmith.model.messages import Message
from tunesmith.model.template import Encoded


def preference(cells: Cells) -> Dialogue:
    """The two conversations of a row, learned where the answers differ. Raises RowError."""
    chosen, rejected = (_answer(cells.needed(name), name) for name in ("chosen", "rejected"))
    prompt = _common(chosen, rejected)
    chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            raise RowError(f"'{name}' does not begin with an answer of the assistant")
    given = [message | {"weight": 0} for message in prompt or _prompt(cells)]
    better, worse = (dialogue(cells, given + answer, cells.get("tools")) for answer in (chosen, rejected))
    return Dialogue(better.messages, better.tools, rejected=worse.messages)


def _answer(value: Any, name: str) -> list[Message]:
    """The messages of an answer: a text, a message, or a list of messages."""
    if isinstance(value, str):
        # In a table's cell messages are JSON. But an answer may be JSON too, and is a text then.
        parsed = json_list(value) if value.lstrip()[:2] in ('{"', "[{") else value
        listed = parsed if isinstance(parsed, list) else [parsed]
        if not all(isinstance(item, dict) and _is_message(item) for item in listed):
            return [{"role": "assistant", "content": value}]
        value = listed
    if value is None:
        return [{"role": "assistant", "content": ""}]
    if not isinstance(value, (dict, list)):
        raise RowError(f"'{name}' is {shown(value)}, not an answer")
    return [spelled(message) for message in (value if isinstance(value, list) else [value])]


def _is_message(item: dict[str, Any]) -> bool:
    return {"role", "content"} <= item.keys() or {"from", "value"} <= item.keys()


def _common(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages with which two whole conversations begin; none if they are answers alone."""
    if not (chosen and rejected) or "assistant" in (chosen[0]["role"], rejected[0]["role"]):
        return []
    # The last message is an answer, even where both are the same.
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return [mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _prompt(cells: Cells) -> list[Message]:
    for column in ("conversations", "messages"):
        if messages := [spelled(message) for message in cells.items(column, needed=False)]:
            return messages
    if cells.get("instruction") is not None:
        return [*history(cells), {"role": "user", "content": instruction(cells)}]
    prompt = turns(cells.needed("prompt"), "prompt")
    if isinstance(prompt, list):
        return [spelled(message) for message in prompt]
    return [{"role": "user", "content": prompt}]


@dataclass(frozen=True)
class EncodedRow:
    """A tokenised row; branches: of a preference, tokens of the prompt and of each answer, else zeros."""

    encoded: Encoded
    branches: tuple[int, int, int] = (0, 0, 0)


def join_answers(chosen: Encoded, rejected: Encoded) -> EncodedRow:
    """Two tokenised conversations as one row: the tokens that both begin with, once, then both rests.

    A pair of which an answer has no token to learn, or whose answers are the same, teaches nothing: no token
    of it is labelled.
    """
    shared = _shared(chosen, rejected)
    ids = chosen.ids + rejected.ids[shared:]
    # The first token of a sequence is predicted by none, even where the two share nothing.
    labels = [IGNORE, *chosen.labels[1:], *([IGNORE] * (shared == 0)), *rejected.labels[max(1, shared) :]]
    same = chosen.ids == rejected.ids
    blank = any(set(e.labels[1:]) <= {IGNORE} for e in (chosen, rejected))
    both = Encoded(
        ids,
        [IGNORE] * len(ids) if same or blank else labels,
        chosen.answers + rejected.answers,
        chosen.unmatched + rejected.unmatched,
        chosen.straddled + rejected.straddled,
        chosen.without_stop + rejected.without_stop,
        chosen.escaped or rejected.escaped,
    )
    return EncodedRow(both, (shared, len(chosen.ids) - shared, len(rejected.ids) - shared))


def _shared(chosen: Encoded, rejected: Encoded) -> int:
    """How many tokens both begin with, none of which is learned in either."""
    for place, (mine, other) in enumerate(zip(chosen.ids, rejected.ids, strict=False)):
        if mine != other or chosen.labels[place] != IGNORE or rejected.labels[place] != IGNORE:
            return place
    return min(len(chosen.ids), len(rejected.ids))
