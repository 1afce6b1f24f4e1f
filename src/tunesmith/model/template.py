"""One rendering for training, evaluation and the endpoint: the model's own chat template, on token ids.

`encode_prompt` gives what the endpoint feeds; `encode_dialogue` gives the whole conversation with labels on
the assistant's answers and their stop tokens. Where an answer begins is found by rendering the messages
before it with the generation prompt, so templates need no `{% generation %}` marks; an answer whose prompt
or text the template renders differently later in the conversation is not supervised, and counted.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunesmith.core.errors import UserError
from tunesmith.core.paths import sha256_json
from tunesmith.model.batch import IGNORE
from tunesmith.model.messages import Message, plain_messages, plain_tools
from tunesmith.model.rendering import MARK, Renderer, TemplateError, Tools, call_of
from tunesmith.model.special import Guard, Guarded, Mark, Tokens, own_backend

__all__ = ["Encoded", "TemplateError", "encode_dialogue", "encode_prompt", "encode_text"]


@dataclass(frozen=True)
class Encoded:
    """A tokenised row: labels[i] is ids[i] where token i is supervised, else IGNORE.

    `unmatched`: answers left unsupervised, since the template renders them differently in the conversation
    than when they are generated. `straddled`: answers whose first token is merged with template text and
    therefore not supervised. `without_stop`: answers after which the template writes no stop token.
    `escaped`: the row holds control-token strings, which were taken as plain text.
    """

    ids: list[int]
    labels: list[int]
    answers: int = 0
    unmatched: int = 0
    straddled: int = 0
    without_stop: int = 0
    escaped: bool = False


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools = None
) -> list[int]:
    """Token ids of the conversation with the generation prompt: what the model is given to answer.

    Raises TemplateError when the template refuses the messages or would lose a part of them.
    """
    return encoder_of(tokenizer).prompt(messages, tools)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Tools = None
) -> Encoded:
    """The whole conversation, labelled on the assistant's answers and their stop tokens.

    An assistant message with `"weight": 0` is not supervised. Raises TemplateError as `encode_prompt` does.
    """
    encoded = encoder_of(tokenizer).dialogues([(messages, tools)])[0]
    if isinstance(encoded, UserError):
        raise encoded
    return encoded


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Plain text without a template: what the tokenizer puts before it, the text, and the end token."""
    return encoder_of(tokenizer).text(text)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> tuple[int, ...]:
    """Ids that end an answer: the template's end of turn first, then the tokenizer's and the model's ends."""
    own = end_ids(getattr(generation_config, "eos_token_id", None))
    wanted = [*encoder_of(tokenizer).turn_ends, tokenizer.eos_token_id, *own]
    return tuple(dict.fromkeys(int(i) for i in wanted if i is not None))


def end_ids(eos_token_id: Any) -> tuple[int, ...]:
    """The ids of a config's eos_token_id, which is None, a number or several."""
    several = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    return tuple(int(i) for i in several if i is not None)


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the chat template and the special tokens that it may write."""
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256_json({"template": tokenizer.chat_template, "special_tokens": names})


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """The encoder of a tokenizer, made once for each template and set of special tokens."""
    known = _encoders.get(tokenizer)
    if known is None or known.made_for != _settings(tokenizer):
        known = _encoders[tokenizer] = ChatEncoder(tokenizer)
    return known


def _settings(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, int, dict[str, Any]]:
    return tokenizer.chat_template, len(tokenizer), tokenizer.special_tokens_map


class ChatEncoder:
    """Renders and tokenises conversations with one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} has no fast implementation (tokenizer.json)",
                hint="use a model that comes with tokenizer.json",
            )
        self.made_for = _settings(tokenizer)
        self._has_template = bool(tokenizer.chat_template)
        self._render = Renderer(tokenizer)
        self._added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self._added_ids = frozenset(self._added.values())
        self._special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._eos: int | None = tokenizer.eos_token_id
        self._backend = own_backend(tokenizer)
        self._guard = Guard(self._backend, self._control_tokens())

    # -- encoding ------------------------------------------------------------------------------------

    def prompt(self, messages: list[Message], tools: Tools) -> list[int]:
        plain, definitions, guarded = self._taken(messages, tools)
        return self._guard.encode(self._render(plain, definitions, generate=True), guarded).ids

    def dialogues(self, rows: Sequence[tuple[list[Message], Tools]]) -> list[Encoded | UserError]:
        """Encode many conversations; those that fail give their error. One tokenizer call for all."""
        drafts: list[_Draft | UserError] = []
        for messages, tools in rows:
            try:
                drafts.append(self._draft(messages, tools))
            except UserError as error:
                drafts.append(error)
        good = [draft for draft in drafts if isinstance(draft, _Draft)]
        tokens = self._guard.encode_batch([(draft.text, draft.guarded) for draft in good])
        done = zip(tokens, self._marked(tokens), strict=True)
        return [self._labelled(d, *next(done)) if isinstance(d, _Draft) else d for d in drafts]

    def text(self, text: str) -> Encoded:
        guarded = Guarded()
        body = self._guard.encode(self._guard.protect(text, guarded), guarded).ids
        ids = self._text_head + body
        if self._eos is not None:
            ids = [*ids, self._eos]
        head = max(1, len(self._text_head))
        return Encoded(ids, [IGNORE] * head + ids[head:], answers=1, escaped=bool(guarded.strings))

    def _draft(self, messages: list[Message], tools: Tools) -> _Draft:
        plain, definitions, guarded = self._taken(messages, tools)
        whole = self._render(plain, definitions)
        spans = []
        for i, message in enumerate(plain):
            if message["role"] == "assistant" and messages[i].get("weight") != 0:
                before = self._render(plain[:i], definitions, generate=True) if i else ""
                until = self._render(plain[: i + 1], definitions) if i + 1 < len(plain) else whole
                spans.append((before, until))
        ends_open = plain[-1]["role"] == "assistant" and messages[-1].get("weight") != 0
        return _Draft(whole, guarded, spans, ends_open)

    def _taken(self, messages: list[Message], tools: Tools) -> tuple[list[Message], Tools, Guarded]:
        """Messages and tools in one spelling, their control strings replaced, nothing that would be lost."""
        plain, definitions = plain_messages(messages), plain_tools(tools)
        self._render.refuse_losses(plain, definitions)
        guarded = Guarded()
        return self._guard.messages(plain, guarded), self._guard.protect(definitions, guarded), guarded

    def _marked(self, rows: list[Tokens]) -> list[list[int]]:
        """Of each row the places of its stop and added tokens."""
        ends = np.cumsum([len(row.ids) for row in rows], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(row.ids for row in rows), dtype=np.int64)
        hits = np.flatnonzero(np.isin(ids, self._marked_ids))
        numbers = np.searchsorted(ends, hits, side="right")
        places = hits - np.concatenate([[0], ends])[numbers]
        found: list[list[int]] = [[] for _ in rows]
        for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
            found[number].append(place)
        return found

    def _labelled(self, draft: _Draft, tokens: Tokens, marked: list[int]) -> Encoded:
        ids, labels = tokens.ids, [IGNORE] * len(tokens.ids)
        marks = self._guard.marks(tokens, marked)
        anchors = [mark for mark in marks if ids[mark[0]] in self._added_ids]
        stops = [mark for mark in marks if ids[mark[0]] in self._stops]
        unmatched = straddled = without_stop = 0
        last_open = False
        for before, until in draft.spans:
            begin, clean = self._begin(draft, tokens, anchors, before)
            end, stopped = self._end(draft, tokens, stops, begin, until)
            if begin is None or end is None or end <= begin:
                unmatched += 1
                continue
            labels[begin:end] = ids[begin:end]
            straddled += not clean
            without_stop += not stopped
            last_open = not stopped and until is draft.text
        if last_open and draft.ends_open and self._eos is not None:
            ids, labels = [*ids, self._eos], [*labels, self._eos]
            without_stop -= 1
        return Encoded(
            ids, labels, len(draft.spans), unmatched, straddled, without_stop, bool(draft.guarded.strings)
        )

    def _begin(
        self, draft: _Draft, tokens: Tokens, anchors: list[Mark], before: str
    ) -> tuple[int | None, bool]:
        """The index of the answer's first token, and whether the prompt's ids end exactly there.

        A tokenizer splits text at its added tokens first, so ids before such a token depend on the text
        before it alone: only what follows the last one within the prompt has to be tokenised again.
        """
        if not draft.text.startswith(before):
            return None, False
        seen = bisect_right(anchors, len(before), key=_END)
        anchor, start, _ = anchors[seen - 1] if seen else (0, 0, 0)
        tail = before[start:]
        plain = not draft.guarded.strings and len(tail) < 256
        tail_ids = (self._guard.short(tail) if plain else self._guard.encode(tail, draft.guarded)).ids
        begin = anchor + len(tail_ids)
        if tokens.ids[anchor:begin] == tail_ids:
            return begin, True
        return bisect_left(tokens.starts, len(before)), False

    def _end(
        self, draft: _Draft, tokens: Tokens, stops: list[Mark], begin: int | None, until: str
    ) -> tuple[int | None, bool]:
        """The index after the answer's stop token, and whether there is one; None if the text differs."""
        if begin is None:
            return None, False
        first = bisect_left(stops, begin, key=_TOKEN)
        if first < len(stops) and stops[first][2] <= len(until):
            token, _, end = stops[first]
            same = until is draft.text or until[:end] == draft.text[:end]
            return (token + 1 if same else None), True
        if not draft.text.startswith(until):
            return None, False
        return bisect_right(tokens.ends, len(until)), False

    # -- the template --------------------------------------------------------------------------------

    @cached_property
    def turn_ends(self) -> tuple[int, ...]:
        """The added tokens with which the template ends an answer, and an answer that calls a tool."""
        if not self._has_template:
            return ()
        asked: Message = {"role": "user", "content": "?"}
        called = {"role": "assistant", "content": "", "tool_calls": [call_of(MARK)]}
        found = (self._end_after_mark([asked, a]) for a in ({"role": "assistant", "content": MARK}, called))
        return tuple(dict.fromkeys(i for i in found if i is not None))

    def _end_after_mark(self, messages: list[Message]) -> int | None:
        try:
            text = self._render(messages)
        except TemplateError:
            return None
        ids = (
            self._backend.encode(text.rpartition(MARK)[2], add_special_tokens=False).ids
            if MARK in text
            else []
        )
        ends = [i for i in ids if i in self._added_ids]
        special = [i for i in ends if self._backend.id_to_token(i) in self._special]
        return next(iter(special or ends), None)

    @cached_property
    def _stops(self) -> frozenset[int]:
        return frozenset(self.turn_ends) | (frozenset() if self._eos is None else {self._eos})

    @cached_property
    def _marked_ids(self) -> list[int]:
        return sorted(self._stops | self._added_ids)

    @cached_property
    def _text_head(self) -> list[int]:
        """What the tokenizer puts before plain text, such as its begin-of-sequence token."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a").ids
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:at]

    def _control_tokens(self) -> dict[str, int]:
        """Special tokens, and the added tokens with which the template begins and ends turns."""
        control = set(self._special)
        for generate in (False, True):
            try:
                text = (
                    self._render([{"role": "user", "content": ""}], generate=generate)
                    if self._has_template
                    else ""
                )
            except TemplateError:
                continue
            written = [
                i for i in self._backend.encode(text, add_special_tokens=False).ids if i in self._added_ids
            ]
            names = [self._backend.id_to_token(i) for i in written]
            # After the generation prompt's first token comes what an answer may write too, such as <think>.
            new = [name for name in names if name not in control]
            control.update(new[:1] if generate else new)
        return {name: self._added[name] for name in control if name in self._added and not name.isspace()}


@dataclass(frozen=True)
class _Draft:
    """A rendered conversation; for each answer the prompt before it and the text until its end."""

    text: str
    guarded: Guarded
    spans: list[tuple[str, str]]
    ends_open: bool


_TOKEN, _END = itemgetter(0), itemgetter(2)
_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, ChatEncoder] = weakref.WeakKeyDictionary()
