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

`answer` is an assistant's message that follows the conversation, such as the chosen one of preference data;
it is used only if the recipe maps it. Lists in a text cell (csv) are read as JSON.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, get_args

from tunesmith.core.errors import UserError
from tunesmith.model.messages import Message, plain_messages, plain_tools
from tunesmith.recipe.schema import Format

NEEDED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("system", "tools", "answer"),
    "sharegpt": ("system", "tools", "answer"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system", "tools"),
    "text": (),
}
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "function": "tool",
    "developer": "system",
}


class RowError(Exception):
    """What is wrong with a row."""


@dataclass(frozen=True)
class Dialogue:
    """One row: messages (and tools), or plain text."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked, or nothing answered."""
        if self.text is not None:
            return not self.text.strip()
        answers = [m for m in self.messages if m["role"] == "assistant"]
        asked = any(m["content"].strip() for m in self.messages if m["role"] != "assistant")
        answered = any(m["content"].strip() or m.get("tool_calls") for m in answers)
        return not asked or (bool(answers) and not answered)

    def digest(self) -> bytes:
        """SHA-256 of the content: the same for the same conversation in another file or format."""
        value = self.text if self.text is not None else [self.messages, self.tools]
        try:
            return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).digest()
        except UnicodeEncodeError:
            raise RowError("holds half of a surrogate pair, which is no text") from None

    def with_system(self, system: str | None) -> Dialogue:
        """The same with a system message, unless it has one."""
        if system is None or self.text is not None or self.messages[0]["role"] == "system":
            return self
        return Dialogue([{"role": "system", "content": system}, *self.messages], self.tools)


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
            return PARSERS[self.format](_Cells(row, self.columns))
        except UserError as error:
            raise RowError(error.what) from None


def shape_of(
    columns: Iterable[str], wanted: str, mapping: dict[str, str], *, file: str, place: str
) -> RowShape:
    """The shape of a file with these columns. `wanted` is a format or auto; `place` the source's key.

    Raises UserError for a mapping or a format that the columns do not fit.
    """
    present = list(dict.fromkeys(columns))
    _check_mapping(present, wanted, mapping, file, place)
    ours = [*mapping, *(name for name in present if name not in mapping)]
    if {"chosen", "rejected"} <= set(present) and "answer" not in mapping:
        raise UserError(
            f"{file}: the columns 'chosen' and 'rejected' make this preference data: "
            "fine-tuning needs one answer",
            hint=f"to learn the chosen answers, set {place}.columns to {{answer: chosen}}",
        )
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


class _Cells:
    """The cells of a row by our names."""

    def __init__(self, row: dict[str, Any], columns: dict[str, str]) -> None:
        self._row, self._columns = row, columns

    def get(self, name: str) -> Any:
        return self._row.get(self._columns.get(name, name))

    def mapped(self, name: str) -> Any:
        return self.get(name) if name in self._columns else None

    def needed(self, name: str) -> Any:
        theirs = self._columns.get(name, name)
        if theirs not in self._row:
            raise RowError(f"has no '{theirs}'")
        return self._row[theirs]

    def text(self, name: str) -> str:
        return _text(self.needed(name), self._columns.get(name, name))

    def optional_text(self, name: str) -> str:
        return _text(self.get(name), self._columns.get(name, name))

    def items(self, name: str, *, needed: bool = True) -> list[Any]:
        value = self.needed(name) if needed else self.get(name)
        parsed = _json_list(value) if isinstance(value, str) and value.strip() else value
        if parsed is None or parsed == "":
            return []
        if not isinstance(parsed, list):
            raise RowError(f"'{self._columns.get(name, name)}' is {_shown(value)}, not a list")
        return parsed


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"'{name}' is {_shown(value)}, not text")
    return value


def _json_list(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


# -- the formats ------------------------------------------------------------------------------------


def _alpaca(cells: _Cells) -> Dialogue:
    messages: list[Message] = []
    for pair in cells.items("history", needed=False):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"'history' holds {_shown(pair)}, not a pair [question, answer]")
        messages += _exchange(_text(pair[0], "history"), _text(pair[1], "history"))
    more = cells.optional_text("input")
    asked = cells.text("instruction") + (f"\n{more}" if more else "")
    return _dialogue(cells, messages + _exchange(asked, cells.text("output")), None)


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _conversation(column: str) -> Callable[[_Cells], Dialogue]:
    def parse(cells: _Cells) -> Dialogue:
        messages = [_spelled(message) for message in cells.items(column)]
        answer = cells.mapped("answer")
        if answer:
            spoken = {"role": "assistant", "content": answer} if isinstance(answer, str) else _spelled(answer)
            messages.append(spoken)
        return _dialogue(cells, messages, cells.get("tools"))

    return parse


def _spelled(message: Any) -> Message:
    """A message with from/value as one with role/content; without the empty cells that tables bring."""
    if not isinstance(message, dict):
        raise RowError(f"{_shown(message)} is not a message")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role", given.get("from"))
    if not isinstance(role, str) or role not in SPEAKERS:
        raise RowError(f"{_shown(role)} is not a role; roles are {', '.join(SPEAKERS)}")
    content = given.get("content", given.get("value"))
    if SPEAKERS[role] == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    rest = {key: value for key, value in given.items() if key not in ("from", "value", "role", "content")}
    return {"role": SPEAKERS[role], "content": content, **rest}


def _calls(content: Any) -> list[Any]:
    """ShareGPT writes a call as JSON text: one `{"name", "arguments"}`, or a list of them."""
    value = _json_list(content) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError(f"the function_call {_shown(content)} is not JSON with a name and arguments")
    return calls


def _prompt_completion(cells: _Cells) -> Dialogue:
    prompt, completion = (_turns(cells.needed(name), name) for name in ("prompt", "completion"))
    if isinstance(prompt, str) != isinstance(completion, str):
        raise RowError("'prompt' and 'completion' must both be text, or both lists of messages")
    if isinstance(prompt, str):
        return _dialogue(cells, _exchange(prompt, completion), cells.get("tools"))
    given = [_spelled(message) | {"weight": 0} for message in prompt]
    return _dialogue(cells, given + [_spelled(message) for message in completion], cells.get("tools"))


def _turns(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return value
    text = _text(value, name)
    listed = _json_list(text) if text.lstrip().startswith('[{"') else text
    return listed if isinstance(listed, list) else text


def _plain(cells: _Cells) -> Dialogue:
    return Dialogue(text=cells.text("text"))


def _dialogue(cells: _Cells, messages: list[Message], tools: Any) -> Dialogue:
    system = cells.optional_text("system")
    if system and messages and messages[0].get("role") == "system":
        if messages[0].get("content") != system:
            raise RowError("has a system message in its column and another in its conversation")
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    if not messages:
        return Dialogue(text="")
    weights = [_weight(message) for message in messages]
    plain = plain_messages(messages)
    for message, weight in zip(plain, weights, strict=True):
        if weight == 0:
            message["weight"] = 0
    return Dialogue(plain, plain_tools(tools))


def _weight(message: Message) -> int:
    """OpenAI's `weight` of an assistant message: 0 keeps it as context and does not learn it."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise RowError(f"the weight of a message is {_shown(weight)}, not 0 or 1")
    return int(weight)


PARSERS: dict[Format, Callable[[_Cells], Dialogue]] = {
    "alpaca": _alpaca,
    "sharegpt": _conversation("conversations"),
    "messages": _conversation("messages"),
    "prompt_completion": _prompt_completion,
    "text": _plain,
}
