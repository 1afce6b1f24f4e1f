"""What a request's tools and tool_choice ask of an answer: checks, and the grammar that holds it to them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.core.errors import UserError
from tunesmith.model import grammar
from tunesmith.model.grammar import GrammarSpec, lark_text, with_json_options
from tunesmith.serve.tool_calls import ARGS, CLOSE, OPEN, ToolFormat, ToolParser, marker_ids, tool_format

Json = dict[str, Any]
ANY_OBJECT: Json = {"type": "object"}
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ARGUMENTS_WORD: dict[ToolFormat, str] = {
    "hermes": "arguments",
    "llama3": "parameters",
    "mistral": "arguments",
    "mistral_args": "",
}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How a request's calls are forced and read.

    kind: the model's form of calls; `is_native` False where its template has none and the Hermes form is
    used. forced: the answer is calls and nothing else. grammar: what the answer is held to, None for nothing.
    marker_ids: special tokens that the text given to the parser must keep. either: the answer is calls or
    content, never both.
    """

    kind: ToolFormat
    is_native: bool
    names: tuple[str, ...]
    forced: bool = False
    grammar: GrammarSpec | None = None
    marker_ids: frozenset[int] = field(default_factory=frozenset)
    either: bool = False

    def parser(self) -> ToolParser:
        """One for each answer."""
        return ToolParser(self.kind, self.names, either=self.either)


@dataclass(frozen=True, slots=True)
class _Tool:
    name: str
    parameters: Json
    strict: bool | None


def plan_tools(
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Json] | None,
    *,
    tool_choice: str | Json | None = None,
    parallel: bool | None = None,
    answer: GrammarSpec | None = None,
) -> ToolPlan | None:
    """What a request's tools, tool_choice and parallel_tool_calls mean; None where nothing may be called.

    tools: as OpenAI has them, in chat or responses form. tool_choice: "auto" (the default), "none",
    "required", a named function, or allowed_tools. "required" and a named function give a grammar of calls
    alone: any number of them, one where `parallel` is False, for a named function, and in the Llama form.
    Each call's arguments follow the tool's schema; with `"strict": false` they are any object. "auto" gives a
    grammar only where something is promised of calls (a tool with `"strict": true`, `parallel` False, a
    narrower choice): text is free, and calls in it are held to names, and to schemas where strict. `answer`,
    of any kind but lark: what the answer must look like that is not calls.

    A model whose template writes no calls is held to the Hermes form, which its prompt does not explain.
    Raises UserError naming the field for tools, schemas and choices that are not possible.
    """
    given = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
    _refuse_twice([tool.name for tool in given])
    mode, names = _choice(tool_choice, [tool.name for tool in given])
    if mode == "none" or not given:
        return None
    native = tool_format(tokenizer)
    kind: ToolFormat = native or "hermes"
    narrowed = len(names) < len(given)
    chosen = [(i, tool) for i, tool in enumerate(given) if tool.name in names]
    forced, one = mode != "auto", parallel is False or kind == "llama3" or mode == "named"
    text = None
    promised = narrowed or parallel is False or answer is not None or any(tool.strict for _, tool in chosen)
    if forced or promised:
        schemas = {tool.name: _arguments(tool, i, forced=forced) for i, tool in chosen}
        held = None if answer is None or forced else grammar.lark_body(answer)
        text = _Writer(tokenizer, kind).grammar(schemas, forced=forced, one=one, answer=held)
    return ToolPlan(
        kind,
        native is not None,
        tuple(tool.name for tool in given),
        forced,
        None if text is None else GrammarSpec("lark", text),
        marker_ids(tokenizer, kind),
        either=answer is not None and not forced,
    )


def _tool(tool: Any, place: str) -> _Tool:
    """Checks one tool. Raises UserError."""
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        raise UserError(f"{place}.type: only functions are supported", hint='give {"type": "function", ...}')
    function = tool.get("function", tool)
    where = f"{place}.function" if "function" in tool else place
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where}.name: {name!r} is not 1 to 64 letters, digits, _ or -")
    strict = function.get("strict")
    if strict not in (None, True, False):
        raise UserError(f"{where}.strict: {strict!r} is not true or false")
    parameters = function.get("parameters")
    parameters = ANY_OBJECT if parameters is None or parameters == {} else parameters
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise UserError(f"{where}.parameters: is not the schema of an object", hint='say "type": "object"')
    parameters = parameters | {"type": "object"}
    _check(parameters, f"{where}.parameters", lenient=True)
    return _Tool(name, parameters, strict)


def _check(schema: Json, place: str, *, lenient: bool) -> None:
    reason = _fault(json.dumps(schema, ensure_ascii=False), lenient)
    if reason is not None:
        raise UserError(f"{place}: {reason[0]}", hint=reason[1])


@lru_cache(maxsize=1024)
def _fault(schema: str, lenient: bool) -> tuple[str, str | None] | None:
    """What is wrong with a schema, and the remedy; lenient: keywords that cannot be enforced are passed."""
    try:
        grammar.check(GrammarSpec("json_schema", schema), lenient=lenient)
    except UserError as error:
        return error.what.removeprefix("json_schema: "), error.hint
    return None


def _refuse_twice(names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"tools[{i}].function.name: there are two tools '{name}'")


def _choice(choice: str | Json | None, names: Sequence[str]) -> tuple[str, frozenset[str]]:
    """(auto, none, required or named; the functions that may be called)."""
    if choice is None or choice in ("auto", "none", "required"):
        if choice == "required" and not names:
            raise UserError("tool_choice: 'required', but there are no tools")
        return str(choice or "auto"), frozenset(names)
    if not isinstance(choice, dict) or choice.get("type") not in ("function", "allowed_tools"):
        raise UserError(f"tool_choice: {choice!r} is not none, auto, required or a function of `tools`")
    if choice["type"] == "function":
        return "named", frozenset({_named(choice, names, "tool_choice")})
    allowed = choice.get("allowed_tools", choice)
    listed, mode = allowed.get("tools"), allowed.get("mode", "auto")
    if not isinstance(listed, list) or not listed or mode not in ("auto", "required"):
        raise UserError("tool_choice.allowed_tools: give mode (auto or required) and tools")
    return mode, frozenset(_named(tool, names, "tool_choice.allowed_tools") for tool in listed)


def _named(tool: Any, names: Sequence[str], place: str) -> str:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise UserError(f"{place}: {name!r} is not among the tools", hint=f"there is {', '.join(names)}")
    return str(name)


def _arguments(tool: _Tool, index: int, *, forced: bool) -> Json:
    """The schema that the arguments are held to."""
    if not (tool.strict or (forced and tool.strict is None)):
        return ANY_OBJECT
    _check(tool.parameters, f"tools[{index}].function.parameters", lenient=False)
    return tool.parameters


class _Writer:
    """The Lark grammar of calls in one form. A marker that is one token of the tokenizer is that token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: ToolFormat) -> None:
        self._kind = kind
        self._added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self._open, self._close = self._mark(OPEN[kind]), self._mark(CLOSE.get(kind, ""))

    def _mark(self, text: str) -> str:
        return f"<[{self._added[text]}]>" if text in self._added else lark_text(text)

    def grammar(self, schemas: dict[str, Json], *, forced: bool, one: bool, answer: str | None) -> str:
        """schemas: of each function's arguments. forced: calls alone; else `answer`, or text and calls."""
        # Where both may be JSON they are compiled alike, or the lexer takes an answer's name for a call's.
        write = self._as_json if answer is not None and self._kind == "llama3" else self._as_text
        rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(schemas)))]
        rules += [f"call_{i}: {write(name, schemas[name])}" for i, name in enumerate(schemas)]
        begin = self._start(forced) if answer is None else self._held(answer)
        return "\n".join([*begin, *self._calls(one), *rules])

    def _as_text(self, name: str, schema: Json) -> str:
        """A call as the template writes it."""
        if self._kind == "mistral_args":
            return f"{lark_text(name)} {self._mark(ARGS)} %json {json.dumps(with_json_options(schema))}"
        head = f'{{"name": {json.dumps(name)}, "{_ARGUMENTS_WORD[self._kind]}": '
        return f'{lark_text(head)} %json {json.dumps(with_json_options(schema))} "}}"'

    def _as_json(self, name: str, schema: Json) -> str:
        """A call as the JSON that it is."""
        word = _ARGUMENTS_WORD[self._kind]
        call = {
            "type": "object",
            "properties": {"name": {"const": name}, word: _moved(schema, f"#/properties/{word}")},
            "required": ["name", word],
            "additionalProperties": False,
        }
        return f"%json {json.dumps(with_json_options(call))}"

    def _held(self, answer: str) -> list[str]:
        opened = "rest" if self._kind == "llama3" else f"{self._open} rest"
        return [f"start: answer | {opened}", f"answer: {answer}"]

    def _calls(self, one: bool) -> list[str]:
        """Rule `rest`: what comes after the first opening marker."""
        if self._kind == "hermes":
            body = rf'"\n" call "\n" {self._close}'
            more = "" if one else rf' ("\n" {self._open} {body})*'
            return [f"rest: {body}{more}"]
        if self._kind == "mistral":
            more = "" if one else ' (", " call)*'
            return [rf'rest: / ?\[/ call{more} "]"']
        if self._kind == "mistral_args":
            return ["rest: call" if one else f"rest: call ({self._open} call)*"]
        return ["rest: call"]

    def _start(self, forced: bool) -> list[str]:
        if self._kind == "llama3":
            return ["start: rest"] if forced else ["start: rest | TEXT", r"TEXT: /([^{\s](.|\n)*)?/"]
        if forced:
            return [f"start: {self._open} rest"]
        first = r"[^\[\s]" if self._kind == "mistral" else r"(.|\n)"
        text = rf"TEXT: /({first}(.|\n)*)?/"
        if OPEN[self._kind] in self._added:
            return [f"start: TEXT | TEXT {self._open} rest", text]
        return ["start: TEXT | head rest", text, f"head[lazy]: TEXT {self._open}"]


def _moved(node: Any, root: str) -> Any:
    """A schema whose references are to itself, as it stands at `root` of another."""
    if isinstance(node, list):
        return [_moved(item, root) for item in node]
    if not isinstance(node, dict):
        return node
    moved = {key: _moved(value, root) for key, value in node.items()}
    target = node.get("$ref")
    return moved | {"$ref": root + target[1:]} if isinstance(target, str) and target[:1] == "#" else moved
