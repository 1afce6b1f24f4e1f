"""Control tokens inside user text: `<|im_end|>` in a row or a request is text, never the end of a turn.

Every occurrence is replaced by one private-use character before the template is rendered; the rendering is
split at these characters, its pieces are tokenised as they are, and the occurrence itself as plain text.
Text without such an occurrence is not touched, so it tokenises exactly as the tokenizer alone does it.
"""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

FIRST_SENTINEL, LAST_SENTINEL = 0xF0000, 0xFFFFD
_SENTINELS = re.compile(f"([{chr(FIRST_SENTINEL)}-{chr(LAST_SENTINEL)}])")


@dataclass(frozen=True)
class Tokens:
    """Token ids of a text, and the characters [starts[i], ends[i]) that each stands for.

    spans: a list of (start, end) or an Encoding, which is asked for them only when they are needed: listing
    all of them takes longer than anything else that is done with a row but tokenising it.
    """

    ids: list[int]
    spans: list[tuple[int, int]] | Encoding

    def start(self, token: int) -> int:
        return self._span(token)[0]

    def end(self, token: int) -> int:
        return self._span(token)[1]

    @cached_property
    def starts(self) -> list[int]:
        return [start for start, _ in self._all]

    @cached_property
    def ends(self) -> list[int]:
        return [end for _, end in self._all]

    @cached_property
    def _all(self) -> list[tuple[int, int]]:
        return self.spans if isinstance(self.spans, list) else self.spans.offsets

    def _span(self, token: int) -> tuple[int, int]:
        if isinstance(self.spans, list):
            return self.spans[token]
        found = self.spans.token_to_chars(token)
        assert found is not None
        return found


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

    def _may_hold(self, text: str) -> bool:
        """False for most texts, by looks that are much faster than the search for all strings."""
        if any(first in text for first in self._firsts):
            return True
        return not text.isascii() and _SENTINELS.search(text) is not None

    def encode_batch(self, texts: list[tuple[str, Guarded]]) -> list[Tokens]:
        """Tokens of many texts; those without a replaced string in one call of the tokenizer."""
        untouched = [text for text, guarded in texts if not guarded.strings]
        done = iter(self._backend.encode_batch(untouched, add_special_tokens=False))
        return [
            self._encode_pieces(text, guarded) if guarded.strings else _tokens(next(done))
            for text, guarded in texts
        ]

    def encode(self, text: str, guarded: Guarded) -> Tokens:
        return self._encode_pieces(text, guarded) if guarded.strings else self._encode(text)

    def _encode(self, text: str) -> Tokens:
        return _tokens(self._backend.encode(text, add_special_tokens=False))

    def _encode_pieces(self, text: str, guarded: Guarded) -> Tokens:
        """The text split at its sentinels; each replaced string counts as one character."""
        ids: list[int] = []
        all_spans: list[tuple[int, int]] = []
        at = 0
        for i, piece in enumerate(_SENTINELS.split(text)):
            if i % 2:
                found = self._as_text(guarded.strings[piece])
                spans = [(0, 1)] * len(found)
            else:
                tokens = self._encode_inside(piece) if i else self._encode(piece)
                found, spans = tokens.ids, list(zip(tokens.starts, tokens.ends, strict=True))
            ids += found
            all_spans += [(at + start, at + end) for start, end in spans]
            at += len(piece)
        return Tokens(ids, all_spans)

    def _encode_inside(self, piece: str) -> Tokens:
        """Tokens of a piece that does not begin its text: no prefix space may be put before it."""
        after = self._encode("\n" + piece)
        skip = len(self._newline)
        if after.ids[:skip] != self._newline:
            return self._encode(piece)
        starts, ends = after.starts[skip:], after.ends[skip:]
        return Tokens(after.ids[skip:], [(s - 1, e - 1) for s, e in zip(starts, ends, strict=True)])

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


def _tokens(encoding: Encoding) -> Tokens:
    return Tokens(encoding.ids, encoding)
