"""What xtuner 0.1 makes of a row: turns, then token ids and labels, piece by piece.

The pieces of a turn (question, answer, separator) are tokenised apart and laid end to end, so no token ever
crosses a border; only the first `max_length` ids are kept, and nothing is put in place of what is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.core.errors import UserError
from tunesmith.recipe.compat import Template
from tunesmith.recipe.schema import Source

NO_OUTPUT = "<nooutput>"
CHATGLM_HEAD = [64790, 64792]


@dataclass(frozen=True)
class Turn:
    """One question and answer; learned: whether the answer has a loss."""

    input: str
    output: str
    system: str = ""
    learned: bool = True


def turns_of(row: dict[str, Any], source: Source) -> list[Turn]:
    """The turns of a row as xtuner's map function for that format makes them; none for a row it drops.

    Raises UserError for a column that is missing, and for a format that it has no map function for.
    """
    reader = READERS.get(source.format)
    if reader is None:
        raise UserError(
            f"compat: rows of the format '{source.format}' are not reproduced",
            hint=f"formats that are: {', '.join(READERS)}; without compat every format is trained",
        )
    try:
        return reader(row, source)
    except KeyError as error:
        raise UserError(f"compat: a row has no column {error}, and xtuner stops there") from None


def _alpaca(row: dict[str, Any], source: Source) -> list[Turn]:
    """alpaca_map_fn and its kin: the newline stands there even when the input is empty."""
    first, more, answer = (_cell(row, source, name) for name in ("instruction", "input", "output"))
    # Only alpaca_map_fn itself, which maps no columns and sets no system message, drops these rows.
    if answer == NO_OUTPUT and not source.columns and not source.system:
        return []
    return [Turn(f"{first}\n{more}", answer, source.system or "")]


def _prompt_completion(row: dict[str, Any], source: Source) -> list[Turn]:
    system = _cell(row, source, "system") if "system" in source.columns else source.system
    return [Turn(_cell(row, source, "prompt"), _cell(row, source, "completion"), system or "")]


def _chat(column: str, role: str, content: str, asks: str, answers: str) -> Any:
    """openai_map_fn and wizardlm_map_fn: questions before an answer are joined without a space."""

    def read(row: dict[str, Any], source: Source) -> list[Turn]:
        found: list[Turn] = []
        system = asked = ""
        messages = list(_cell(row, source, column))
        while messages and messages[0][role] == answers:
            messages = messages[1:]
        for message in messages:
            if message[role] == "system":
                system = message[content]
            elif message[role] == asks:
                asked += message[content]
            elif message[role] == answers:
                found.append(Turn(asked, message[content], system))
                system = asked = ""
            else:
                raise UserError(f"compat: the role '{message[role]}' is none of xtuner's, which stops there")
        return found

    return read


def _turns(row: dict[str, Any], source: Source) -> list[Turn]:
    return [
        Turn(
            turn.get("input") or "",
            turn.get("output") or "",
            turn.get("system") or "",
            turn.get("output_with_loss", True) is not False,
        )
        for turn in _cell(row, source, "conversation")
    ]


def _guanaco(row: dict[str, Any], source: Source) -> list[Turn]:
    """oasst1_map_fn: pairs in the order of the text, whoever speaks; a last single one is left out."""
    said: list[str] = []
    for part in _cell(row, source, "text").strip().split("###"):
        for speaker in ("Human:", "Assistant:"):
            if part.strip().startswith(speaker):
                said.append(part.strip().removeprefix(speaker).strip())
    return [Turn(a, b) for a, b in zip(said[0::2], said[1::2], strict=False)]


def _text(row: dict[str, Any], source: Source) -> list[Turn]:
    return [Turn("", _cell(row, source, "text").strip())]


READERS = {
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "sharegpt": _chat("conversations", "from", "value", "human", "gpt"),
    "messages": _chat("messages", "role", "content", "user", "assistant"),
    "turns": _turns,
    "guanaco": _guanaco,
    "text": _text,
}


def _cell(row: dict[str, Any], source: Source, name: str) -> Any:
    return row[source.columns.get(name, name)]


# -- tokens ---------------------------------------------------------------------------------------------


def encode_rows(
    rows: Sequence[list[Turn]], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[bool]]]:
    """(ids, learned) of every row in full, not cut. One tokenizer call for all pieces."""
    pieces = [piece for turns in rows for n, turn in enumerate(turns) for piece in _pieces(turn, n, template)]
    found = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else [])
    begin, end = begin_end_ids(tokenizer)
    return [_encoded(turns, template, found, begin, end) for turns in rows]


def _pieces(turn: Turn, number: int, template: Template) -> tuple[str, str, str]:
    """Question, answer and separator as text."""
    slots = {"input": turn.input, "system": turn.system, "round": number + 1}
    asked = template.instruction.format(**slots)
    head = template.system.format(**slots) if turn.system else ""
    return head + asked, turn.output + template.suffix, template.sep


def _encoded(
    turns: list[Turn], template: Template, found: Any, begin: list[int], end: list[int]
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    learned: list[bool] = []

    def add(tokens: list[int], *, loss: bool) -> None:
        ids.extend(tokens)
        learned.extend([loss] * len(tokens))

    fresh = True
    for turn in turns:
        question, answer, sep = next(found), next(found), next(found)
        if fresh:
            add(begin, loss=False)
        add(question, loss=False)
        add(answer, loss=turn.learned)
        if not template.suffix_as_eos:
            add(end, loss=turn.learned)
        fresh = not template.suffix_as_eos
        add(sep, loss=False)
    return ids, learned


def begin_end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that xtuner puts before a row and after an answer, by the class of the tokenizer.

    A tokenizer without a begin token gets none; xtuner stops with a TypeError there, but for Qwen's.
    """
    name, end = type(tokenizer).__name__, tokenizer.eos_token_id
    if end is None:
        raise UserError(f"compat: the tokenizer {name} has no end token, which xtuner needs")
    if name == "ChatGLMTokenizer":
        return CHATGLM_HEAD, [end]
    qwen = name.lower().startswith("qwen")
    return ([] if qwen or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), [end]
