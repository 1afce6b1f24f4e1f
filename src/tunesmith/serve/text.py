"""From tokens to text as they come: never half a character, never a part of a stop string.

`Answer` follows one answer; it hands out text that is final, with the tokens that it consists of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from tunesmith.model.requests import Logprobs, TokenEvent
from tunesmith.serve.tool_calls import CallDelta, ToolParser

UNFINISHED = "\ufffd"
# A UTF-8 character has at most four bytes: more tokens than that in waiting are no character any more.
MOST_HELD = 8


class Detokenizer:
    """Text of token ids, special tokens left out."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._special = frozenset(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)
        self.piece = lru_cache(maxsize=4096)(self._piece)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        if self._fast is not None:
            return str(self._fast.decode(list(ids), skip_special_tokens=skip_special))
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
            )
        )

    def decode_keeping(self, ids: Sequence[int], kept: frozenset[int]) -> str:
        """The text of ids without special tokens, but with those in `kept`."""
        if not kept:
            return self.decode(ids)
        hidden = self._special - kept
        return self.decode([i for i in ids if i not in hidden], skip_special=False)

    def _piece(self, token_id: int) -> tuple[str, list[int]]:
        """A token's own text and its bytes; the text of half a character is the replacement character."""
        text = self.decode([token_id], skip_special=False)
        name = self.tokenizer.convert_ids_to_tokens(token_id)
        alphabet = _byte_alphabet()
        if UNFINISHED in text and name and all(character in alphabet for character in name):
            return text, [alphabet[character] for character in name]
        return text, list(text.encode("utf-8", errors="replace"))


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for the 256 bytes (GPT-2's table)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return table | {chr(256 + place): byte for place, byte in enumerate(hidden)}


class TextStream:
    """Text of a growing list of ids, given out in pieces that join to the text of the whole.

    kept: special tokens that are text here.
    """

    def __init__(self, detokenizer: Detokenizer, kept: frozenset[int] = frozenset()) -> None:
        self._decode = partial(detokenizer.decode_keeping, kept=kept)
        # The ids since the last border, and how much text those before `_read` make: a token's text may
        # depend on the one before it (leading spaces), so a border keeps the last piece as context.
        self._ids: list[int] = []
        self._read = 0
        self._known = ""

    def push(self, token_id: int) -> str:
        """The text that has become final with this token."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) - self._read < MOST_HELD:
            return ""
        return self._take(text)

    def finish(self) -> str:
        """What was held back."""
        return self._take(self._decode(self._ids)) if self._read < len(self._ids) else ""

    def _take(self, text: str) -> str:
        new = text[len(self._known) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        return new


class StopMatcher:
    """Ends text at the first stop string, and holds back whatever may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is final, whether a stop string was met); nothing after it counts."""
        if not self._stops:
            return text, False
        self._held += text
        # Of several, the one that is complete first, as if characters came one by one.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)[1]], ""
            return text, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False

    def finish(self) -> str:
        """What was held back and became no stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Token:
    """A token whose text begins `offset` characters into the answer. A prompt's first has no logprobs."""

    offset: int
    token_id: int
    logprobs: Logprobs | None


@dataclass(slots=True)
class Piece:
    """Final text, the tokens that begin in it where log-probabilities were asked for, parts of tool calls.

    False where there is nothing in it to tell.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    calls: list[CallDelta] = field(default_factory=list)
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.calls or self.finish_reason)

    def add(self, more: Piece) -> None:
        """What comes after it."""
        self.text += more.text
        self.tokens += more.tokens
        self.calls += more.calls
        self.finish_reason = more.finish_reason


class Answer:
    """One answer: its text as it comes, how many tokens it took, and how it ended.

    echo: the prompt's ids and its text, to stand before the answer; None: the answer alone. calls: reads
    tool calls out of the text; kept: the special tokens that it looks for. `sum_logprob` is that of all
    tokens where log-probabilities were asked for; `cached_tokens`: of the prompt, those that the engine's
    cache had already.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        echo: tuple[Sequence[int], str] | None = None,
        calls: ToolParser | None = None,
        kept: frozenset[int] = frozenset(),
    ) -> None:
        self._detokenizer = detokenizer
        self._stream = TextStream(detokenizer, kept)
        self._calls = calls
        self._matcher = StopMatcher(stops)
        self._stop_ids = frozenset(stop_ids)
        self._echo = echo
        self._decoded = self._given = len(echo[1]) if echo else 0
        self._waiting: list[Token] = []
        self.num_tokens = self.cached_tokens = 0
        self.sum_logprob = 0.0
        self.finish_reason: str | None = None

    @property
    def mean_logprob(self) -> float:
        """Of a token of the answer; 0 for an empty one."""
        return self.sum_logprob / max(self.num_tokens, 1)

    def push(self, event: TokenEvent) -> Piece:
        """What this event adds. After a stop string `finish_reason` is "stop": cancel the request."""
        before = self._take_echo(event)
        self.cached_tokens += event.cached_tokens
        text, stopped = "", False
        if event.token_id is not None:
            self.num_tokens += 1
            text, stopped = self._decode(event.token_id, event.logprobs)
        if event.finish_reason is not None and not stopped:
            rest, stopped = self._matcher.push(self._stream.finish())
            text += rest if stopped else rest + self._matcher.finish()
        self.finish_reason = "stop" if stopped else event.finish_reason
        self._given += len(text)
        tokens = self._ready(whole=event.finish_reason is not None and not stopped)
        content, calls = self._without_calls(text)
        return Piece(before.text + content, before.tokens + tokens, calls, self.finish_reason)

    def _without_calls(self, text: str) -> tuple[str, list[CallDelta]]:
        """(what of the text is content, parts of calls); an answer that ends with calls says so."""
        if self._calls is None:
            return text, []
        deltas = [self._calls.push(text)]
        if self.finish_reason is not None:
            deltas.append(self._calls.finish())
        calls = [call for delta in deltas for call in delta.calls]
        if self.finish_reason == "stop" and self._calls.num_calls:
            self.finish_reason = "tool_calls"
        return "".join(delta.content for delta in deltas), calls

    def _decode(self, token_id: int, logprobs: Logprobs | None) -> tuple[str, bool]:
        if logprobs is not None:
            self.sum_logprob += logprobs.logprob
        if token_id in self._stop_ids:
            return "", False
        if logprobs is not None:
            self._waiting.append(Token(self._decoded, token_id, logprobs))
        decoded = self._stream.push(token_id)
        self._decoded += len(decoded)
        return self._matcher.push(decoded)

    def _ready(self, *, whole: bool) -> list[Token]:
        """The waiting tokens that begin in text already given out; all when the answer is `whole`."""
        ready = [token for token in self._waiting if whole or token.offset < self._given]
        self._waiting = self._waiting[len(ready) :]
        return ready

    def _take_echo(self, event: TokenEvent) -> Piece:
        """The prompt, before the first piece."""
        if self._echo is None:
            return Piece()
        (ids, text), self._echo = self._echo, None
        piece = Piece(text)
        if event.prompt_logprobs is not None:
            stream, offset = TextStream(self._detokenizer), 0
            for token_id, logprobs in zip(ids, (None, *event.prompt_logprobs), strict=True):
                piece.tokens.append(Token(min(offset, len(text)), token_id, logprobs))
                offset += len(stream.push(token_id))
        return piece
