"""Answers that keep to a grammar: a JSON schema, a regular expression, a choice, or a Lark grammar.

The library llguidance compiles the grammar and says, token by token, what may follow. A specification is
plain data: the process that takes a request compiles it to check it, the process that computes compiles it
again to use it; both keep what they compiled. Compiling takes a millisecond for most schemas and some 100
for the largest, outside Python's lock, so a server does it in a side thread.

Shapes: B rows, V vocabulary of the model's head, W = ceil(V / 32) words of a bit mask.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from tunesmith.core import optional
from tunesmith.core.errors import MissingExtra, UserError
from tunesmith.model.special import own_backend

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]
# Compiled, most take under a megabyte, the largest 200 times their text.
KEPT_GRAMMARS, KEPT_CHARACTERS = 256, 1_000_000
# A space, or a new line and its indent, as JSON is written everywhere: a model that is given any white space
# may write nothing else until the answer is full.
WHITESPACE = r"( |\r?\n[ \t]{0,64})?"
JSON_OPTIONS = {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}
MAX_LEXER_STATES = 50_000
MAX_DEPTH = 100
# A number that must be a multiple is followed by its remainder: 100,000 of them take a second to compile.
MAX_REMAINDERS = 20_000


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer must look like, as plain data.

    json_object: any JSON object (text is empty). json_schema: text is the schema as JSON. regex: the whole
    answer matches it (the syntax of Rust's regex: no look-around, no back-references). choice: text is a JSON
    list of strings, one of which is the answer. lark: a grammar in llguidance's form of Lark.
    """

    kind: GrammarKind
    text: str = ""

    @staticmethod
    def schema(schema: dict[str, Any] | bool) -> GrammarSpec:
        return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False))

    @staticmethod
    def one_of(choices: Sequence[str]) -> GrammarSpec:
        return GrammarSpec("choice", json.dumps(list(choices), ensure_ascii=False))


class Grammars:
    """The grammars for one tokenizer, the most recently used of them kept compiled. Safe between threads.

    vocab_size: V; ids that the tokenizer does not have are never allowed. stop_ids: tokens that may end an
    answer where its grammar may end.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, stop_ids: Sequence[int], *, kept: int = KEPT_GRAMMARS
    ) -> None:
        self.vocab_size = vocab_size
        self.stop_ids = frozenset(stop_ids)
        self._tokenizer = tokenizer
        self._kept = kept
        self._compiled: OrderedDict[GrammarSpec, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()

    def prepare(self) -> None:
        """Read the tokenizer now (half a second, 30 MB), not at the first grammar. Raises MissingExtra."""
        self._library_tokenizer()

    def check(self, spec: GrammarSpec) -> None:
        """Compile it, or raise UserError with the library's reason."""
        self._start(spec)

    def matcher(self, spec: GrammarSpec) -> Matcher:
        """One that stands at the beginning of an answer. Raises UserError as `check` does."""
        return Matcher(self, self._start(spec).deep_copy())

    def _start(self, spec: GrammarSpec) -> Any:
        with self._lock:
            if spec in self._compiled:
                self._compiled.move_to_end(spec)
                return self._compiled[spec]
        library = llguidance()
        limits = library.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        # Outside the lock: others need not wait for a large schema.
        start = library.LLMatcher(self._library_tokenizer(), source(spec), log_level=0, limits=limits)
        if not start.is_error():
            # Some outgrow the limits, or match nothing at all, which shows at the first token only.
            start.compute_bitmask()
        if start.is_error():
            raise _refusal(spec, start.get_error())
        self._keep(spec, start)
        return start

    def _keep(self, spec: GrammarSpec, start: Any) -> None:
        with self._lock:
            self._compiled[spec] = start
            while len(self._compiled) > 1 and (
                len(self._compiled) > self._kept or sum(len(s.text) for s in self._compiled) > KEPT_CHARACTERS
            ):
                self._compiled.popitem(last=False)

    def _library_tokenizer(self) -> Any:
        with self._tokenizer_lock:
            return self._made_tokenizer

    @cached_property
    def _made_tokenizer(self) -> Any:
        backend = own_backend(self._tokenizer)
        size = max(self.vocab_size, backend.get_vocab_size(with_added_tokens=True))
        stops = sorted(i for i in self.stop_ids if i < size) or [self._tokenizer.eos_token_id or 0]
        return llguidance().LLTokenizer(backend.to_str(), n_vocab=size, eos_token=stops)

    @cached_property
    def num_words(self) -> int:
        """W for every token of the tokenizer, which may have more than V."""
        return -(-int(self._library_tokenizer().vocab_size) // 32)


class Matcher:
    """Follows one answer through its grammar."""

    __slots__ = ("_state", "grammars")

    def __init__(self, grammars: Grammars, state: Any) -> None:
        self.grammars = grammars
        self._state = state

    @property
    def may_end(self) -> bool:
        """Whether the answer as it stands is complete."""
        return bool(self._state.is_accepting())

    @property
    def is_done(self) -> bool:
        """Whether it is complete and nothing can follow: only stop tokens are allowed."""
        return bool(self._state.is_stopped()) and not self.failed

    @property
    def failed(self) -> bool:
        """Whether it was given a token that does not fit, or the grammar outgrew the library's limits."""
        return bool(self._state.is_error())

    def advance(self, token_id: int) -> bool:
        """Take the answer's next token; False, and `failed` from now on, when it does not fit."""
        return bool(self._state.consume_token(token_id))

    def fill(self, words_W: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Write the bit mask of what may follow; stop tokens are among it where the answer may end."""
        self._state.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)


def check(spec: GrammarSpec, *, lenient: bool = False) -> None:
    """Raise UserError, with the library's reason, for a grammar that is not one; for any tokenizer.

    lenient: a schema may have keywords that could not be enforced.
    """
    bad, messages = llguidance().LLMatcher.validate_grammar_with_warnings(source(spec, lenient=lenient))
    if bad:
        raise _refusal(spec, messages[0])


def lark_body(spec: GrammarSpec) -> str:
    """The right side of a Lark rule that matches what `spec` does. Raises UserError for a bad or lark one."""
    check(spec)
    if spec.kind == "lark":
        raise UserError("lark: a whole grammar cannot be a part of another", hint="use a schema or a regex")
    if spec.kind == "regex":
        return f"/{llguidance().regex_to_lark(spec.text, '')}/"
    if spec.kind == "choice":
        return _choice(spec.text)
    schema = json.loads(_schema(spec))
    return f"%json {json.dumps(with_json_options(schema if isinstance(schema, dict) else {}))}"


def with_json_options(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as it stands inside a Lark grammar (`%json`), compiled as a json_schema is."""
    return schema | {"x-guidance": JSON_OPTIONS}


@lru_cache(maxsize=1)
def llguidance() -> Any:
    """The library. Raises MissingExtra."""
    try:
        return optional.load("llguidance")
    except ImportError:
        raise MissingExtra("llguidance", "serve") from None


def source(spec: GrammarSpec, *, lenient: bool = False) -> str:
    """The grammar in the library's own form. Raises UserError for a text that is not of its kind."""
    matcher = llguidance().LLMatcher
    if not spec.text.isascii() and re.search("[\ud800-\udfff]", spec.text):
        raise UserError(f"{spec.kind}: {_shown(spec.text)} has half of a surrogate pair")
    if spec.kind == "lark":
        return str(matcher.grammar_from_lark(spec.text))
    if spec.kind == "regex":
        return str(matcher.grammar_from_regex(spec.text))
    if spec.kind == "choice":
        return str(matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {_choice(spec.text)}"))
    options = JSON_OPTIONS | {"lenient": lenient, "coerce_one_of": lenient}
    try:
        return str(matcher.grammar_from_json_schema(_schema(spec), overrides=options))
    except ValueError:
        raise UserError(f"json_schema: {_shown(spec.text)} is not JSON") from None


def _schema(spec: GrammarSpec) -> str:
    """The schema's text, after the checks that the library does not make."""
    if spec.kind == "json_object":
        return '{"type": "object"}'
    schema, whole = _json(spec), 1
    if not isinstance(schema, (dict, bool)):
        raise UserError(f"json_schema: {_shown(spec.text)} is not a schema", hint="give an object")
    for path, node in _walk(schema):
        step = node.get("multipleOf")
        if isinstance(step, (int, float)) and math.isfinite(step):
            whole = math.lcm(whole, int("".join(map(str, Decimal(str(step)).normalize().as_tuple().digits))))
        if whole > MAX_REMAINDERS:
            raise UserError(f"json_schema: {path}: multipleOf {step} is too large to be followed")
    return spec.text


def _choice(text: str) -> str:
    """The alternatives, as the right side of a rule."""
    choices = _json(GrammarSpec("choice", text))
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
        raise UserError(f"choice: {_shown(text)} is not a list of strings", hint='such as ["yes", "no"]')
    return " | ".join(lark_text(choice) for choice in dict.fromkeys(choices))


def lark_text(text: str) -> str:
    """A string as a literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _json(spec: GrammarSpec) -> Any:
    try:
        value = json.loads(spec.text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{spec.kind}: {_shown(spec.text)} has half of a surrogate pair") from None
    except ValueError as error:
        raise UserError(f"{spec.kind}: {_shown(spec.text)} is not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{spec.kind}: is nested more than {MAX_DEPTH} levels deep") from None
    return value


def _refusal(spec: GrammarSpec, message: str) -> UserError:
    reason = _reason(message)
    if spec.kind not in ("json_schema", "json_object"):
        return UserError(f"{spec.kind}: {_shown(spec.text)}: {reason}")
    keys = re.findall(r'"([^"]+)"', reason) if reason.startswith("Unimplemented keys") else []
    if reason.startswith("oneOf"):
        return UserError(
            f"json_schema: {_places(spec, ['oneOf'])}the members of oneOf overlap",
            hint="use anyOf, or give each member a property that tells it apart (const)",
        )
    if keys:
        return UserError(
            f"json_schema: {_places(spec, keys)}not supported: {', '.join(keys)}",
            hint="say it in the prompt and check the answer, or leave it out",
        )
    return UserError(f"json_schema: {reason}")


def _reason(message: str) -> str:
    """The library's message without the grammar that it was made into."""
    regex = re.search(r"^error: (.*)$", message, re.MULTILINE)
    if regex:
        return regex[1]
    first = message.strip().splitlines()[0] if message.strip() else "it does not compile"
    if first.startswith("NoExtension"):
        return "no answer can match it"
    return re.sub(r"^at \d+\(\d+\): ", "", first)


def _places(spec: GrammarSpec, keys: Sequence[str]) -> str:
    """Where in the schema the first of `keys` stands, such as `$.properties.name: `."""
    return next((f"{path}: " for path, node in _walk(_json(spec)) if set(keys) & set(node)), "")


def _walk(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in it, with its path. Raises UserError for one that is nested too deeply."""
    todo: list[tuple[int, str, Any]] = [(0, "$", schema)]
    while todo:
        depth, path, node = todo.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"json_schema: is nested more than {MAX_DEPTH} levels deep")
        inner: list[tuple[str, Any]] = []
        if isinstance(node, dict):
            yield path, node
            inner = [(f"{path}.{key}", value) for key, value in node.items()]
        elif isinstance(node, list):
            inner = [(f"{path}[{place}]", value) for place, value in enumerate(node)]
        todo += [(depth + 1, *item) for item in reversed(inner)]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
