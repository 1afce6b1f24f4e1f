"""Control tokens inside user text: `<|im_end|>` in a row or a request is text, never the end of a turn.

Every occurrence is replaced by one private-use character before the template is rendered; the rendering is
split at these characters, its pieces are tokenised as they are, and the occurrence itself as plain text.
Text without such an occurrence is not touched, so it tokenises exactly as the tokenizer alone does it.
"""

from __future__ import annotations

import json
import re
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from tunesmith.model.messages import ROLES, Message

FIRST_SENTINEL, LAST_SENTINEL = 0xF0000, 0xFFFFD
_SENTINELS = re.compile(f"([{chr(FIRST_SENTINEL)}-{chr(LAST_SENTINEL)}])")
_WORDS = ("role", "content", *ROLES.values())


Span = tuple[int, int]
Mark = tuple[int, int, int]  # a token's place, and the characters [start, end) that it stands for


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text, and the characters [starts[i], ends[i]) that each stands for.

    find_spans: gives (start, end) of every token; asked only when needed, since it costs more than anything
    else that is done with a row but tokenising it. text: the text, unless something in it was replaced.
    """

    ids: list[int]
    find_spans: Callable[[], list[Span]]
    text: str | None = None

    @cached_property
    def spans(self) -> list[Span]:
        return self.find_spans()

    @cached_property
    def starts(self) -> list[int]:
        return [start for start, _ in self.spans]

    @cached_property
    def ends(self) -> list[int]:
        return [end for _, end in self.spans]


@dataclass
class Guarded:
    """Strings that were replaced in one conversation: sentinel -> string."""

    strings: dict[str, str] = field(default_factory=dict)

    def sentinel(self, found: re.Match[str]) -> str:
        for sentinel, string in self.strings.items():
            if string == found.group():
                return sentinel
        sentinel = chr(FIRST_SENTINEL + len(self.strings))
        self.strings[sentinel] = found.group()
        return sentinel


class Guard:
    """Encodes text in which the strings `control` are tokens only where a template wrote them."""

    def __init__(self, backend: Tokenizer, control: dict[str, int]) -> None:
        self._backend = backend
        self._control_ids = frozenset(control.values())
        longest_first = sorted(control, key=len, reverse=True)
        self._found = re.compile("|".join([*map(re.escape, longest_first), _SENTINELS.pattern]))
        self._firsts = sorted({string[0] for string in control})
        self._literal = _literal_tokens(backend)
        self._harmless = frozenset(word for word in _WORDS if not self._found.search(word))
        self._newline = self._encode("\n").ids
        self.short = lru_cache(maxsize=4096)(self._encode)

    @cached_property
    def _plain(self) -> Tokenizer:
        return _without_added_tokens(self._backend)

    def protect(self, value: Any, guarded: Guarded) -> Any:
        """`value` (text, or lists and objects of text) with every control string replaced."""
        if isinstance(value, str):
            return self._found.sub(guarded.sentinel, value) if self._may_hold(value) else value
        if isinstance(value, list):
            return [self.protect(item, guarded) for item in value]
        if isinstance(value, dict):
            return {self.protect(key, guarded): self.protect(item, guarded) for key, item in value.items()}
        return value

    def messages(self, messages: list[Message], guarded: Guarded) -> list[Message]:
        """As `protect`; quicker where a message is a role and a text."""
        plain = self._harmless.issuperset(("role", "content"))
        return [
            message | {"content": self.protect(message["content"], guarded)}
            if plain and len(message) == 2 and message["role"] in self._harmless
            else self.protect(message, guarded)
            for message in messages
        ]

    def _may_hold(self, text: str) -> bool:
        """False for most texts, by looks that are much faster than the search for all strings."""
        for first in self._firsts:
            if first in text:
                return True
        return not text.isascii() and _SENTINELS.search(text) is not None

    def encode_batch(self, texts: list[tuple[str, Guarded]]) -> list[Tokens]:
        """Tokens of many texts; those without a replaced string in one call of the tokenizer."""
        done = iter(self._encode_plain([text for text, guarded in texts if not guarded.strings]))
        return [
            self._encode_pieces(text, guarded) if guarded.strings else next(done) for text, guarded in texts
        ]

    def _encode_plain(self, texts: list[str]) -> list[Tokens]:
        """What all texts begin with, such as a system message, is tokenised once."""
        cut = self._cut(texts)
        head = self._encode(texts[0][:cut]).ids if cut else []
        rests = [text[cut:] for text in texts] if cut else texts
        done = self._backend.encode_batch_fast(rests, add_special_tokens=False)
        return [
            Tokens(head + one.ids, partial(self._spans, text), text)
            for text, one in zip(texts, done, strict=True)
        ]

    def _cut(self, texts: list[str]) -> int:
        """Where the last literal token within the texts' common beginning starts; 0 if there is none.

        The library splits a text at such a token before it does anything else, so that ids on either side do
        not depend on the other.
        """
        common = _common_beginning(min(texts), max(texts)) if len(texts) > 1 else ""
        return max([0, *(common.rfind(content) for content in self._literal.values())])

    def _spans(self, text: str) -> list[Span]:
        return self._backend.encode(text, add_special_tokens=False).offsets

    def marks(self, tokens: Tokens, places: list[int]) -> list[Mark]:
        """The tokens at `places`, of which all added tokens of the text are, with their characters."""
        found = self._literal_marks(tokens, places)
        return [(t, *tokens.spans[t]) for t in places] if found is None else found

    def _literal_marks(self, tokens: Tokens, places: list[int]) -> list[Mark] | None:
        """Literal tokens found in the text itself; None unless each of their occurrences is one."""
        if tokens.text is None:
            return None
        text, at, marks, counts = tokens.text, 0, [], Counter[str]()
        for place in places:
            content = self._literal.get(tokens.ids[place])
            if content is None or (start := text.find(content, at)) < 0:
                return None
            at = start + len(content)
            marks.append((place, start, at))
            counts[content] += 1
        return marks if all(text.count(content) == n for content, n in counts.items()) else None

    def encode(self, text: str, guarded: Guarded) -> Tokens:
        return self._encode_pieces(text, guarded) if guarded.strings else self._encode(text)

    def _encode(self, text: str) -> Tokens:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return Tokens(encoding.ids, lambda: encoding.offsets)

    def _encode_pieces(self, text: str, guarded: Guarded) -> Tokens:
        """The text split at its sentinels; each replaced string counts as one character."""
        ids: list[int] = []
        all_spans: list[Span] = []
        at = 0
        for i, piece in enumerate(_SENTINELS.split(text)):
            if i % 2:
                found = self._as_text(guarded.strings[piece])
                spans = [(0, 1)] * len(found)
            else:
                tokens = self._encode_inside(piece) if i else self._encode(piece)
                found, spans = tokens.ids, tokens.spans
            ids += found
            all_spans += [(at + start, at + end) for start, end in spans]
            at += len(piece)
        return Tokens(ids, lambda: all_spans)

    def _encode_inside(self, piece: str) -> Tokens:
        """Tokens of a piece that does not begin its text: no prefix space may be put before it."""
        after = self._encode("\n" + piece)
        skip = len(self._newline)
        if after.ids[:skip] != self._newline:
            return self._encode(piece)
        return Tokens(after.ids[skip:], lambda: [(start - 1, end - 1) for start, end in after.spans[skip:]])

    def _as_text(self, string: str) -> list[int]:
        """Plain-text tokens of a control string; by its characters where the vocabulary knows the whole."""
        for parts in ([string], list(string)):
            ids = [i for part in parts for i in self._after_newline(part)]
            if not self._control_ids.intersection(ids):
                return ids
        raise ValueError(f"the tokenizer has no plain text for {string!r}")

    def _after_newline(self, text: str) -> list[int]:
        newline = self._plain.encode("\n", add_special_tokens=False).ids
        ids = self._plain.encode("\n" + text, add_special_tokens=False).ids
        if ids[: len(newline)] == newline:
            return ids[len(newline) :]
        return self._plain.encode(text, add_special_tokens=False).ids


def own_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the Rust tokenizer that nobody else sets.

    The shared one keeps the truncation, padding and special-token handling of whoever called it last.
    """
    known = _copies.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = False
        known = _copies[tokenizer] = (len(tokenizer), copy)
    return known[1]


_copies: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Tokenizer]] = (
    weakref.WeakKeyDictionary()
)


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer that knows no added token, so that it takes every string for text."""
    described = json.loads(backend.to_str())
    described["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(described))


def _common_beginning(first: str, last: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), None)
    return first[:at]


def _literal_tokens(backend: Tokenizer) -> dict[int, str]:
    """The added tokens that are found in a text wherever it holds their string, and end what is before them.

    Such a token is looked for in the text as it is, takes no spaces beside it, and its first character stands
    within no added token, so that no other one can reach into it.
    """
    added = backend.get_added_tokens_decoder()
    inner = {character for token in added.values() for character in token.content[1:]}
    return {
        number: token.content
        for number, token in added.items()
        if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and not (token.content[:1] in inner or re.match(r"\w|\s|$", token.content))
    }
