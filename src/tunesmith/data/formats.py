"""From a row as it is written to the conversation (or text) that it means.

    format             columns (* needed)                         meaning
    alpaca             instruction* input output* system history  user: instruction, a newline and input if
                                                                  there is one; assistant: output; history:
                                                                  pairs [question, answer] before it
    sharegpt           conversations* system tools answer         messages with from/value or role/content
    messages           messages* system tools answer              OpenAI messages, with tool_calls
    prompt_completion  prompt* completion* system tools           texts (user and assistant), or two lists of
                                                                  messages, of which the second is learned
    text               text*                                      plain text: no template, all of it learned
    preference         chosen* rejected* and one of prompt,       two answers (texts, messages, or lists of
                       conversations, messages, instruction;      them) to one prompt; without a prompt, two
                       system tools input history                 whole conversations with a common beginning
    turns              conversation*                              xtuner's: turns with input and output
    guanaco            text*                                      `### Human: …### Assistant: …`
    moss               chat* meta_instruction                     MOSS-003's turns with thoughts and tools

`answer` is an assistant's message that follows the conversation, such as the chosen one of preference data;
it is used only if the recipe maps it. Lists and messages in a text cell (csv) are read as JSON.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args

from tunesmith.core.errors import UserError
from tunesmith.data import dialects
from tunesmith.data.dialogue import (
    Cells,
    Dialogue,
    RowError,
    dialogue,
    exchange,
    history,
    instruction,
    spelled,
    turns,
)
from tunesmith.data.preference import preference
from tunesmith.recipe.schema import Format

NO_OUTPUT = "<nooutput>"  # how the Alpaca data set marks an answer that is missing

NEEDED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "turns": ("conversation",),
    "moss": ("chat",),
    "guanaco": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("system", "tools", "answer"),
    "sharegpt": ("system", "tools", "answer"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system", "tools"),
    "text": (),
    "preference": (
        "prompt", "conversations", "messages", "instruction", "input", "history", "system", "tools",
    ),
    "turns": (),
    "moss": ("meta_instruction",),
    "guanaco": (),
}  # fmt: skip


@dataclass(frozen=True)
class RowShape:
    """How the rows of a file are written: the format, and our name of a column -> the file's name."""

    format: Format
    columns: dict[str, str]

    def parse(self, row: Any) -> Dialogue:
        """The conversation of a row. Raises RowError."""
        if not isinstance(row, dict):
            raise RowError(f"a {type(row).__name__}, not an object with columns")
        try:
            return PARSERS[self.format](Cells(row, self.columns))
        except UserError as error:
            raise RowError(error.what) from None


def shape_of(
    columns: Iterable[str],
    wanted: str,
    mapping: dict[str, str],
    *,
    file: str,
    place: str,
    pairs: bool = False,
) -> RowShape:
    """The shape of a file with these columns. `wanted` is a format or auto; `place` the source's key.

    pairs: whether rows with two answers are wanted, or rows with one. Raises UserError for the other kind,
    and for a mapping or a format that the columns do not fit.
    """
    present = list(dict.fromkeys(columns))
    _check_mapping(present, wanted, mapping, file, place)
    ours = [*mapping, *(name for name in present if name not in mapping)]
    has_pairs = {"chosen", "rejected"} <= set(ours) and "answer" not in mapping
    if pairs:
        if not has_pairs or wanted not in ("auto", "preference"):
            raise no_pairs(file, f"its columns are {_names(present)}", place, wanted)
        return RowShape("preference", mapping)
    if has_pairs or wanted == "preference":
        raise only_pairs(file, place)
    if wanted != "auto":
        return _wanted_shape(wanted, ours, mapping, file, present)
    fitting = [name for name, needed in NEEDED.items() if set(needed) <= set(ours)]
    if not fitting:
        raise UserError(
            f"{file}: no format fits the columns {_names(present)}",
            hint=f"name the columns in {place}.columns (ours: the file's), such as {{instruction: question, "
            f"output: reply}}; the first line of a csv file must name its columns",
        )
    return RowShape(fitting[0], mapping)


def only_pairs(file: str, place: str) -> UserError:
    """The error for preference data where one answer is to be learned."""
    return UserError(
        f"{file}: the columns 'chosen' and 'rejected' make this preference data: "
        "fine-tuning needs one answer",
        hint="set objective.type to dpo, orpo or kto to learn the preference; to learn the chosen answers "
        f"alone, set {place}.columns to {{answer: chosen}}",
    )


def no_pairs(file: str, found: str, place: str, wanted: str = "auto") -> UserError:
    """The error for other data where preferences are to be learned."""
    given = "" if wanted in ("auto", "preference") else f" read as '{wanted}'"
    return UserError(
        f"{file}:{given} preferences are learned from rows with a chosen and a rejected answer; {found}",
        hint=f"set {place}.format to auto, and name the columns in {place}.columns, such as "
        "{chosen: better, rejected: worse}; or set objective.type to sft",
    )


def _wanted_shape(
    wanted: str, ours: list[str], mapping: dict[str, str], file: str, present: list[str]
) -> RowShape:
    shape = next(name for name in get_args(Format) if name == wanted)
    missing = [name for name in NEEDED[shape] if name not in ours]
    if missing:
        raise UserError(
            f"{file}: the column {_names(missing)} of the format '{wanted}' is missing; the file has "
            f"{_names(present)}",
            hint=_nearest(missing[0], present) or f"map it: columns: {{{missing[0]}: NAME}}",
        )
    return RowShape(shape, mapping)


def _check_mapping(present: list[str], wanted: str, mapping: dict[str, str], file: str, place: str) -> None:
    formats = [f for f in get_args(Format) if wanted in ("auto", f)]
    known = {name for f in formats for name in (*NEEDED[f], *OPTIONAL[f])}
    for ours, theirs in mapping.items():
        if ours not in known:
            hint = _nearest(ours, known) or f"ours are {', '.join(sorted(known))}"
            raise UserError(f"{place}.columns: '{ours}' is not one of our columns", hint=hint)
        if theirs not in present:
            raise UserError(
                f"{file}: the column '{theirs}' ({place}.columns.{ours}) is missing; "
                f"the file has {_names(present)}",
                hint=_nearest(theirs, present),
            )


def _nearest(name: str, names: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else None


def _names(names: list[str]) -> str:
    shown = [repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:12]]
    return ", ".join(shown) + (" ..." if len(names) > 12 else "")


# -- the formats ------------------------------------------------------------------------------------


def _alpaca(cells: Cells) -> Dialogue:
    given = cells.text("output")
    answer = "" if given == NO_OUTPUT else given
    return dialogue(cells, history(cells) + exchange(instruction(cells), answer), None)


def _conversation(column: str) -> Callable[[Cells], Dialogue]:
    def parse(cells: Cells) -> Dialogue:
        messages = [spelled(message) for message in cells.items(column)]
        answer = cells.mapped("answer")
        if answer:
            spoken = {"role": "assistant", "content": answer} if isinstance(answer, str) else spelled(answer)
            messages.append(spoken)
        return dialogue(cells, messages, cells.get("tools"))

    return parse


def _prompt_completion(cells: Cells) -> Dialogue:
    prompt, completion = (turns(cells.needed(name), name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError("'prompt' and 'completion' must both be text, or both lists of messages")
    if isinstance(prompt, str):
        return dialogue(cells, exchange(prompt, completion), cells.get("tools"))
    given = [spelled(message) | {"weight": 0} for message in prompt]
    return dialogue(cells, given + [spelled(message) for message in completion], cells.get("tools"))


def _plain(cells: Cells) -> Dialogue:
    return Dialogue(text=cells.text("text"))


PARSERS: dict[Format, Callable[[Cells], Dialogue]] = {
    "alpaca": _alpaca,
    "sharegpt": _conversation("conversations"),
    "messages": _conversation("messages"),
    "prompt_completion": _prompt_completion,
    "text": _plain,
    "preference": preference,
    "turns": dialects.turns,
    "moss": dialects.moss,
    "guanaco": dialects.guanaco,
}
