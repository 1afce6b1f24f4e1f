"""A model's chat template as a function from messages to text, and what it has no place for.

Rendering goes through transformers' `apply_chat_template`. Conversations of plain texts, which most are, take
a way that skips its copies: the same source compiled in the same environment, and used only if it gave the
same text as transformers for a few conversations when it was made.
"""

from __future__ import annotations

import weakref
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from tunesmith.core.errors import UserError
from tunesmith.model.messages import Message

Tools = list[dict[str, Any]] | None
OTHER_TEMPLATE = "set model.chat_template to a Jinja file that renders it"
MARK = "Qzx7Mark"


class TemplateError(UserError):
    """The chat template is missing, refuses a conversation, or would lose a part of it."""


class Renderer:
    """Renders conversations in the one spelling (`model.messages`) with a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # The tokenizer keys the table of encoders weakly: a strong reference here would keep it for ever.
        self._tokenizer = weakref.ref(tokenizer)
        self._template = tokenizer.chat_template
        self._features: dict[str, bool] = {}
        self._given = {**tokenizer.special_tokens_map, "tools": None, "documents": None}
        self._compiled = _compiled(self._template)
        if self._compiled is not None and not self._agrees():
            self._compiled = None

    def __call__(self, messages: list[Message], tools: Tools = None, *, generate: bool = False) -> str:
        """The text of a conversation, with or without the generation prompt. Raises TemplateError."""
        text = self._plainly(messages, generate) if tools is None else None
        return self._by_transformers(messages, tools, generate) if text is None else text

    def _plainly(self, messages: list[Message], generate: bool) -> str | None:
        """The text, the short way; None where that way is not sure to be transformers' own."""
        if self._compiled is None or not messages or not all(_is_plain(message) for message in messages):
            return None
        try:
            return self._compiled.render(self._given, messages=messages, add_generation_prompt=generate)
        except Exception:  # a template may raise anything; transformers' way tells what
            return None

    def _by_transformers(self, messages: list[Message], tools: Tools, generate: bool) -> str:
        tokenizer = self._tokenizer()
        assert tokenizer is not None
        if not self._template:
            raise TemplateError(
                "this model has no chat template, so it cannot render a conversation",
                hint="set model.chat_template to a Jinja file, or train rows of the format 'text'",
            )
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=generate, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateError(
                f"the model's chat template refuses it: {error}", hint=OTHER_TEMPLATE
            ) from None

    def _agrees(self) -> bool:
        """Whether both ways give the same text for the conversations of SAMPLES."""
        return all(self._agrees_on(messages, generate) for messages in SAMPLES for generate in (False, True))

    def _agrees_on(self, messages: list[Message], generate: bool) -> bool:
        text = self._plainly(messages, generate)
        try:
            return text in (None, self._by_transformers(messages, None, generate))
        except TemplateError:
            return text is None

    # -- what the template would lose ----------------------------------------------------------------

    def refuse_losses(self, messages: list[Message], tools: Tools) -> None:
        """Raise TemplateError for the parts of a conversation that the template has no place for."""
        for part in sorted(_parts_used(messages, tools)):
            if part not in self._features:
                self._features[part] = self._shows(part)
            if not self._features[part]:
                raise TemplateError(
                    f"the model's chat template has no place for {part}: it would be lost",
                    hint=OTHER_TEMPLATE,
                )

    def _shows(self, part: str) -> bool:
        """Whether a mark in that part of a conversation comes out of the template."""
        return any(self._shows_mark(messages, tools) for messages, tools in PROBES[part])

    def _shows_mark(self, messages: list[Message], tools: Tools) -> bool:
        try:
            return MARK in self(messages, tools)
        except TemplateError:
            return False


def _compiled(template: Any) -> jinja2.Template | None:
    """The template in the environment that transformers makes for it, or None where it makes none."""
    try:
        theirs: jinja2.Template = chat_template_utils._compile_jinja_template(template)  # type: ignore[attr-defined,unused-ignore]
        own = theirs.environment.from_string(template)
    except Exception:  # not one template, or one with a fault, or another version of transformers
        return None
    own.globals = dict(theirs.globals)  # a chain of maps takes longer to copy than all else to render
    return own


def _is_plain(message: Message) -> bool:
    """Whether there is nothing in a message but its role and its text."""
    return len(message) == 2 and type(message.get("content")) is str


def call_of(name: str, value: str = "1") -> dict[str, Any]:
    """A tool call for probes."""
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": {"x": value}}}


def _parts_used(messages: list[Message], tools: Tools) -> set[str]:
    used = {"tool definitions"} if tools else set()
    for message in messages:
        if message["role"] == "system" and message["content"]:
            used.add("a system message")
        elif message["role"] == "tool":
            used.add("tool results")
        if "tool_calls" in message:
            used |= {"tool calls"} | ({"text beside a tool call"} if message["content"] else set())
        if "reasoning_content" in message:
            used.add("reasoning")
    return used


_USER: Message = {"role": "user", "content": "?"}
_PLAIN: Message = {"role": "assistant", "content": "."}
_SYSTEM: Message = {"role": "system", "content": " Be\nbrief. "}
_CALL: Message = {"role": "assistant", "content": "", "tool_calls": [call_of("f")]}
_RESULT: Message = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": MARK}
_PARAMETERS = {"type": "object", "properties": {"x": {"type": "string"}}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": _PARAMETERS}}
_MARKED_TOOL = {"type": "function", "function": {"name": MARK, "description": "f", "parameters": _PARAMETERS}}
SAMPLES = [[_USER], [_USER, _PLAIN], [_SYSTEM, _USER, _PLAIN, _USER, {**_PLAIN, "content": "{{ x }} <é>\n"}]]

# For each part of a conversation: probes in which a mark stands there; one that shows it is enough.
PROBES: dict[str, list[tuple[list[Message], Tools]]] = {
    "a system message": [([{"role": "system", "content": MARK}, _USER], None)],
    "tool definitions": [([_USER], [_MARKED_TOOL])],
    "tool calls": [
        ([_USER, {**_CALL, "tool_calls": [call_of("f", MARK)]}], [_TOOL]),
        ([_USER, {**_CALL, "tool_calls": [call_of("f", MARK)]}], None),
    ],
    "text beside a tool call": [([_USER, {**_CALL, "content": MARK}], [_TOOL])],
    "tool results": [([_USER, _CALL, _RESULT], [_TOOL]), ([_USER, _PLAIN, _RESULT], None)],
    "reasoning": [([_USER, {**_PLAIN, "reasoning_content": MARK}], None)],
}
