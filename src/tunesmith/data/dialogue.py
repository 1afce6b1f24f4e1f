"""A row's cells, and the conversation that a row means."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from tunesmith.model.messages import Message, plain_messages, plain_tools

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


_CONTENT = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


class RowError(Exception):
    """What is wrong with a row."""


def held_out_below(fraction: float) -> int:
    """Rows whose digest's first 64 bits are a smaller number are held out."""
    return int(min(fraction * 2.0**64, 2.0**64 - 2048))


@dataclass(frozen=True)
class Dialogue:
    """One row: messages (and tools), or plain text.

    rejected: of a preference, the conversation with the rejected answer; `messages` has the chosen one.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    rejected: list[Message] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked, or nothing answered; of a preference, by either answer."""
        if self.text is not None:
            return not self.text.strip()
        if self.rejected is not None:
            return any(_is_empty([m for m in c if _learned(m)]) for c in (self.messages, self.rejected))
        return _is_empty(self.messages)

    def digest(self) -> bytes:
        """SHA-256 of the content: the same for the same conversation in another file or format."""
        rejected = [] if self.rejected is None else [self.rejected]
        value = self.text if self.text is not None else [self.messages, self.tools, *rejected]
        try:
            return hashlib.sha256(_CONTENT.encode(value).encode()).digest()
        except UnicodeEncodeError:
            raise RowError("holds half of a surrogate pair, which is no text") from None

    def is_held_out(self, fraction: float) -> bool:
        """Whether its content is among the `fraction` of all that `data.eval_fraction` holds out."""
        return int.from_bytes(self.digest()[:8], "little") < held_out_below(fraction)

    def with_system(self, system: str | None) -> Dialogue:
        """The same with a system message, unless it has one."""
        if system is None or self.text is not None or self.messages[0]["role"] == "system":
            return self
        first = {"role": "system", "content": system}
        rejected = None if self.rejected is None else [first, *self.rejected]
        return Dialogue([first, *self.messages], self.tools, rejected=rejected)


def _learned(message: Message) -> bool:
    return message["role"] != "assistant" or message.get("weight") != 0


def _is_empty(messages: list[Message]) -> bool:
    answers = [m for m in messages if m["role"] == "assistant"]
    asked = any(m["content"].strip() for m in messages if m["role"] != "assistant")
    answered = any(m["content"].strip() or m.get("tool_calls") for m in answers)
    return not asked or (bool(answers) and not answered)


class Cells:
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
        return text(self.needed(name), self._columns.get(name, name))

    def optional_text(self, name: str) -> str:
        return text(self.get(name), self._columns.get(name, name))

    def items(self, name: str, *, needed: bool = True) -> list[Any]:
        value = self.needed(name) if needed else self.get(name)
        parsed = json_list(value) if isinstance(value, str) and value.strip() else value
        if parsed is None or parsed == "":
            return []
        if not isinstance(parsed, list):
            raise RowError(f"'{self._columns.get(name, name)}' is {shown(value)}, not a list")
        return parsed


def text(value: Any, name: str) -> str:
    """A cell's text; an empty cell is the empty text. Raises RowError for anything else."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"'{name}' is {shown(value)}, not text")
    return value


def json_list(value: str) -> Any:
    """What a cell's JSON says; the text itself if it is none."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def shown(value: Any) -> str:
    plain = repr(value)
    return f"{plain if len(plain) <= 60 else plain[:57] + '...'} ({type(value).__name__})"


# -- messages ------------------------------------------------------------------------------------------


def exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def spelled(message: Any) -> Message:
    """A message with from/value as one with role/content; without the empty cells that tables bring."""
    if not isinstance(message, dict):
        raise RowError(f"{shown(message)} is not a message")
    given = {key: value for key, value in message.items() if value is not None}
    role = given.get("role", given.get("from"))
    if not isinstance(role, str) or role not in SPEAKERS:
        raise RowError(f"{shown(role)} is not a role; roles are {', '.join(SPEAKERS)}")
    content = given.get("content", given.get("value"))
    if SPEAKERS[role] == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(content)}
    rest = {key: value for key, value in given.items() if key not in ("from", "value", "role", "content")}
    return {"role": SPEAKERS[role], "content": content, **rest}


def _calls(content: Any) -> list[Any]:
    """ShareGPT writes a call as JSON text: one `{"name", "arguments"}`, or a list of them."""
    value = json_list(content) if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError(f"the function_call {shown(content)} is not JSON with a name and arguments")
    return calls


def turns(value: Any, name: str) -> Any:
    """A text, or a list of messages (in a table's cell as JSON)."""
    if isinstance(value, list):
        return value
    given = text(value, name)
    listed = json_list(given) if given.lstrip().startswith('[{"') else given
    return listed if isinstance(listed, list) else given


def dialogue(cells: Cells, messages: list[Message], tools: Any) -> Dialogue:
    """The messages in the one spelling, behind the row's system message. Raises RowError and UserError."""
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
        raise RowError(f"the weight of a message is {shown(weight)}, not 0 or 1")
    return int(weight)


def history(cells: Cells) -> list[Message]:
    """The earlier turns of an alpaca row."""
    messages: list[Message] = []
    for pair in cells.items("history", needed=False):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"'history' holds {shown(pair)}, not a pair [question, answer]")
        messages += exchange(text(pair[0], "history"), text(pair[1], "history"))
    return messages


def instruction(cells: Cells) -> str:
    """The question of an alpaca row."""
    more = cells.optional_text("input")
    return cells.text("instruction") + (f"\n{more}" if more else "")
