"""Tool calls in an answer's text: how models write them, and from their text to OpenAI's objects.

hermes   <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>, one after the other (Hermes, Qwen)
llama3   {"name": "f", "parameters": {...}} as the whole answer, with or without <|python_tag|> before it
mistral  [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]
mistral_args  [TOOL_CALLS]f[ARGS]{...}, one after the other (since Mistral's tokenizer 11)

Which of them a model writes is what its chat template writes for a call. The readers take more than the
templates write: either word for the arguments, keys in any order, several objects where one is usual.
What a request may ask of its calls, and the grammar for it, is in `tool_grammar`.
"""

from __future__ import annotations

import json
import re
import secrets
import string
import weakref
from collections.abc import Collection, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tunesmith.model.rendering import MARK, Renderer, TemplateError, call_of

ToolFormat = Literal["hermes", "llama3", "mistral", "mistral_args"]
Json = dict[str, Any]

# What opens and what closes a block of calls; and how an answer begins that is nothing but calls.
OPEN: dict[ToolFormat, str] = {
    "hermes": "<tool_call>",
    "llama3": "<|python_tag|>",
    "mistral": "[TOOL_CALLS]",
    "mistral_args": "[TOOL_CALLS]",
}
ARGS, CALL_ID = "[ARGS]", "[CALL_ID]"
CLOSE: dict[ToolFormat, str] = {"hermes": "</tool_call>"}
BARE: dict[ToolFormat, str] = {"llama3": "{", "mistral": "["}
_WRITTEN: dict[ToolFormat, str] = {
    "hermes": rf'<tool_call>\s*\{{\s*"name":\s*"{MARK}",\s*"arguments"',
    "mistral": rf'\[TOOL_CALLS\]\s*\[\s*\{{\s*"name":\s*"{MARK}",\s*"arguments"',
    "mistral_args": rf"\[TOOL_CALLS\]\s*{MARK}(\[CALL_ID\]\w+)?\[ARGS\]\s*\{{",
    "llama3": rf'\{{\s*"name":\s*"{MARK}",\s*"parameters"',
}
_ARGUMENTS = ("arguments", "parameters")
_KEYS = frozenset({"name", "type", "id", *_ARGUMENTS})
# A function's name before its arguments, and what may become that.
_NAMED = re.compile(r"([\w-]{1,64})(?:\[CALL_ID\]\w*)?\[ARGS\]\s*")
_NAMED_SO_FAR = re.compile(r"[\w-]{0,64}(?:\[[A-Z_]*(?:\]\w*(?:\[[A-Z]*)?)?)?")
_SPACE, _FIRST, _BETWEEN = re.compile(r"\s*"), re.compile(r"\s*(?:\[\s*)?"), re.compile(r"[\s,;\]]*")


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of one call: the first has its id and name, all have a piece of its arguments' JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """What a piece of an answer adds: content outside of calls, and parts of calls."""

    content: str = ""
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON text as the model wrote it, an object unless the answer was cut within it."""

    id: str
    name: str
    arguments: str

    def as_openai(self) -> Json:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def tool_format(tokenizer: PreTrainedTokenizerBase) -> ToolFormat | None:
    """The form in which the model's chat template writes a call; None when it writes none of ours."""
    template = tokenizer.chat_template
    known = _formats.get(tokenizer)
    if known is None or known[0] != template:
        known = _formats[tokenizer] = (template, _find_format(tokenizer) if template else None)
    return known[1]


_formats: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ToolFormat | None]] = (
    weakref.WeakKeyDictionary()
)


def _find_format(tokenizer: PreTrainedTokenizerBase) -> ToolFormat | None:
    call = {"role": "assistant", "content": "", "tool_calls": [call_of(MARK)]}
    parameters = {"type": "object", "properties": {"x": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": MARK, "description": "f", "parameters": parameters}}
    for tools in ([tool], None):
        try:
            text = Renderer(tokenizer)([{"role": "user", "content": "?"}, call], tools)
        except TemplateError:
            continue
        return next((kind for kind, written in _WRITTEN.items() if re.search(written, text)), None)
    return None


def marker_ids(tokenizer: PreTrainedTokenizerBase, kind: ToolFormat) -> frozenset[int]:
    """The tokens that mark calls and are special: the text that a parser is given must keep them."""
    marks = {OPEN[kind], CLOSE.get(kind, "")} | ({ARGS, CALL_ID} if kind == "mistral_args" else set())
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(i for i, token in added if token.special and token.content in marks)


def parse(text: str, kind: ToolFormat, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """The content of a whole answer, and its calls."""
    parser = ToolParser(kind, names)
    deltas = (parser.push(text), parser.finish())
    return "".join(delta.content for delta in deltas), whole_calls(c for d in deltas for c in d.calls)


def whole_calls(deltas: Iterable[CallDelta]) -> list[ToolCall]:
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        begun = calls.get(delta.index) or ToolCall(delta.id or "", delta.name or "", "")
        calls[delta.index] = ToolCall(begun.id, begun.name, begun.arguments + delta.arguments)
    return list(calls.values())


class ToolParser:
    """Follows one answer's text; what it gives out does not depend on how the text is cut.

    names: the tools that there are. An answer that begins like a call without a marker is one only if it
    names one of them. White space between content and calls is dropped. What turns out to be no call (broken
    JSON, no name, an answer cut before the arguments began) stays content. either: an answer that does not
    begin with a call has none: a marker within it is a part of its text.
    """

    def __init__(self, kind: ToolFormat, names: Collection[str], *, either: bool = False) -> None:
        self._kind, self._names, self._either = kind, frozenset(names), either
        self._open, self._close = OPEN[kind], CLOSE.get(kind)
        self._text = ""  # what has come and is not given out
        self._ended = False
        self._content: list[str] = []
        self._calls: list[CallDelta] = []
        self._said = False
        self.num_calls = 0
        self._steps = self._answer()
        next(self._steps)

    def push(self, text: str) -> ToolDelta:
        """What has become certain with this text."""
        self._text += text
        next(self._steps)
        return self._take()

    def finish(self) -> ToolDelta:
        """What was held back, at the end of the answer."""
        self._ended = True
        next(self._steps, None)
        return self._take()

    def _take(self) -> ToolDelta:
        delta = ToolDelta("".join(self._content), tuple(self._calls))
        self._content, self._calls = [], []
        return delta

    # The steps below yield where they need more text; after the last of it `_ended` is set.

    def _answer(self) -> Generator[None, None, None]:
        if self._kind in BARE:
            space = yield from self._skip(_SPACE)
            if self._text.startswith(BARE[self._kind]):
                yield from self._read_calls("", space)
            else:
                self._text = space + self._text
        while mark := (yield from self._read_content()):
            yield from self._read_calls(mark, "")

    def _skip(self, pattern: re.Pattern[str]) -> Generator[None, None, str]:
        """What matches `pattern`, once it is known where that ends."""
        while True:
            found = pattern.match(self._text)
            assert found is not None
            if found.end() < len(self._text) or self._ended:
                self._text = self._text[found.end() :]
                return found.group()
            yield

    def _read_content(self) -> Generator[None, None, str]:
        """Give out text until calls begin: the marker, with the space before it; empty at the end."""
        while True:
            at, mark = self._find_marker()
            if mark:
                said = self._text[:at].rstrip()
                gap, self._text = self._text[len(said) : at], self._text[at + len(mark) :]
                self._say(said)
                if mark == self._open:
                    return gap + mark
            elif self._ended:
                self._say(self._last_words() if self.num_calls else self._text)
                return ""
            else:
                held = max((_begun(mark, self._text) for mark in self._markers), default=0)
                said = self._text[: len(self._text) - held].rstrip()
                self._text = self._text[len(said) :]
                self._say(said)
                yield

    @property
    def _markers(self) -> list[str]:
        """A closing marker is one only after a call; it belongs to nothing there."""
        at_once = not self._said and (self._text.startswith(self._open) or self._open.startswith(self._text))
        if self._either and not (self.num_calls or at_once):
            return []
        return [self._open, self._close] if self._close and self.num_calls else [self._open]

    def _find_marker(self) -> tuple[int, str]:
        return min(((self._text.find(m), m) for m in self._markers if m in self._text), default=(0, ""))

    def _last_words(self) -> str:
        """What is left after calls, without space and without a closing marker that was cut."""
        cut = _begun(self._close, self._text) if self._close else 0
        return self._text[: len(self._text) - (cut if cut > 1 else 0)].rstrip()

    def _say(self, text: str) -> None:
        text = text.lstrip() if self.num_calls and not self._said else text
        if text:
            self._said = True
            self._content.append(text)

    def _read_calls(self, mark: str, before: str) -> Generator[None, None, None]:
        """One call after the other. What is none goes back to the text; its marker is content then."""
        names = None if mark else self._names
        before += yield from self._skip(_FIRST)
        name = (yield from self._read_name()) if self._kind == "mistral_args" else ""
        before += name
        while self._text.startswith("{"):
            read = _Object(names, name)
            if not (yield from self._read_call(read)):
                self._text = before + read.text + self._text
                self._say(mark)
                return
            mark = name = ""
            before = re.sub(r"[,;\]]", "", (yield from self._skip(_BETWEEN)))
        self._text = before + self._text
        self._say(mark)

    def _read_name(self) -> Generator[None, None, str]:
        """What stands before the arguments of a call in the form `mistral_args`; empty if that is no name."""
        while not self._ended:
            found = _NAMED.match(self._text)
            if found is not None and found.end() < len(self._text):
                self._text = self._text[found.end() :]
                return found.group()
            if found is None and not _NAMED_SO_FAR.fullmatch(self._text):
                break
            yield
        return ""

    def _read_call(self, read: _Object) -> Generator[None, None, bool]:
        """Give out a call as it comes; False when it is none."""
        index: int | None = None
        while True:
            self._text = read.feed(self._text)
            if index is None and read.is_call:
                index = self.num_calls
                self.num_calls += 1
                self._calls.append(CallDelta(index, id=self._new_id(), name=read.name))
            if index is not None and (piece := read.take_arguments()):
                self._calls.append(CallDelta(index, piece))
            if read.is_done or read.is_hopeless or self._ended:
                return index is not None
            yield

    def _new_id(self) -> str:
        """Mistral's templates take nine letters and digits and nothing else."""
        if self._kind in ("mistral", "mistral_args"):
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def _begun(mark: str, text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


class _Object:
    """Follows one JSON object as it comes: its name, and where its arguments stand.

    names: those that a call may have; None: any. before: where it stands before the object, the call's name;
    the object then is the arguments.
    """

    def __init__(self, names: Collection[str] | None, before: str = "") -> None:
        self.text = ""
        self.name: str | None = before.partition("[")[0] or None
        self.is_done = self.is_hopeless = False
        self._names = names
        self._at = self._depth = self._given = 0
        self._string: int | None = None
        self._key: str | None = None
        self._awaits_key = True
        self._begin: int | None = 0 if before else None
        self._end: int | None = None
        self._other = ""

    def feed(self, text: str) -> str:
        """Take what belongs to the object; what comes after it."""
        self.text += text
        while not (self.is_done or self.is_hopeless):
            found = (_OUTSIDE if self._string is None else _INSIDE).search(self.text, self._at)
            if found is None:
                self._at = max(self._at, len(self.text))
                return ""
            self._at = found.end()
            self._see(found.group(), found.start())
        rest = self.text[self._at :]
        self.text = self.text[: self._at]
        return rest

    @property
    def is_call(self) -> bool:
        """Known as soon as the name is and the arguments have begun, or else at the end."""
        if self.name is None or self.is_hopeless:
            return False
        return self._begin is not None or (self.is_done and self._finds_arguments())

    def _finds_arguments(self) -> bool:
        """Arguments that are no object: written as a string, or, after a marker, none at all."""
        try:
            whole = json.loads(self.text, strict=False)
            given: Any = next((whole[key] for key in _ARGUMENTS if key in whole), None)
            self._other = "{}" if given is None and self._names is None else given
            return isinstance(json.loads(self._other), dict)
        except (ValueError, TypeError):
            return False

    def take_arguments(self) -> str:
        """Their text as far as it has come, without what was taken before."""
        if self._begin is None:
            piece, self._other = self._other, ""
            return piece
        until = len(self.text) if self._end is None else self._end
        piece = self.text[self._begin + self._given : until]
        self._given += len(piece)
        return piece

    def _see(self, character: str, at: int) -> None:
        if self._string is not None:
            if character == "\\":
                self._at += 1
            else:
                self._end_string(self._string, at + 1)
        elif character == '"':
            self._string = at
        elif character in "{[":
            self._depth += 1
            if self._depth == 2 and character == "{" and self._key in _ARGUMENTS and self._begin is None:
                self._begin = at
        elif character in "}]":
            self._close(at + 1)
        elif self._depth == 1:
            self._awaits_key = character == ","

    def _close(self, end: int) -> None:
        self._depth -= 1
        # Arguments that begin with the object (0) end with it.
        if self._depth == 1 and self._begin not in (None, 0) and self._end is None:
            self._end = end
        self.is_done = self._depth == 0

    def _end_string(self, start: int, end: int) -> None:
        self._string = None
        if self._depth != 1:
            return
        try:
            value = str(json.loads(self.text[start:end], strict=False))
        except ValueError:
            value = ""
        if self._awaits_key:
            self._key = value
        elif self._key == "name" and self.name is None:
            self.name = value
        # A call that was given out stays one, whatever follows: it may not depend on how the text is cut.
        if self._names is not None and (self.name is None or self._begin is None):
            known = value in _KEYS if self._awaits_key else self._key != "name" or value in self._names
            self.is_hopeless = not known


_INSIDE, _OUTSIDE = re.compile(r'["\\]'), re.compile(r'["{}\[\],:]')
