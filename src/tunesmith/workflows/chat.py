"""tunesmith chat: one conversation with a model or run, in this process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

from tunesmith.core.errors import UserError
from tunesmith.model.generate import Generator
from tunesmith.model.requests import SamplingParams
from tunesmith.model.template import encode_prompt, stop_token_ids
from tunesmith.serve.text import Answer, Detokenizer
from tunesmith.workflows.open_model import OpenModel
from tunesmith.workflows.open_served import open_served

Message = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """An answer: its text, tokens of prompt and answer, why it ended ("cancelled" on Ctrl-C), seconds."""

    answer: str
    tokens: int
    prompt_tokens: int
    finish_reason: str
    seconds: float


@dataclass
class Chat:
    """A conversation with its history."""

    opened: OpenModel
    system: str | None = None
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    history: list[Message] = field(default_factory=list)
    last: Said | None = None

    def __post_init__(self) -> None:
        self._generator = Generator(
            self.opened.model, max_length=self.opened.context_length, max_concurrent=1
        )
        self._detokenizer = Detokenizer(self.opened.tokenizer)
        self._stop_ids = stop_token_ids(self.opened.tokenizer, self.opened.model.generation_config)
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but not the system message."""
        self.history = [] if self.system is None else [{"role": "system", "content": self.system}]

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text` in pieces; afterwards it is in `last` and in the history.

        SIGINT ends the answer early and is not raised. Raises UserError when the conversation no longer
        fits the context; the history is then as it was.
        """
        messages = [*self.history, {"role": "user", "content": text}]
        prompt = encode_prompt(self.opened.tokenizer, messages)
        room = self.opened.context_length - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the context {self.opened.context_length}",
                hint="/reset begins a new one",
            )
        started, parts = time.monotonic(), []
        answer = Answer(self._detokenizer, stop_ids=self._stop_ids)
        for part in self._generate(prompt, min(room, self.max_tokens or room), answer):
            parts.append(part)
            yield part
        reason, whole = answer.finish_reason or "cancelled", "".join(parts)
        self.last = Said(whole, answer.num_tokens, len(prompt), reason, round(time.monotonic() - started, 3))
        self.history = [*messages, {"role": "assistant", "content": whole}]

    def _generate(self, prompt: list[int], max_tokens: int, answer: Answer) -> Iterator[str]:
        params = SamplingParams(
            max_new_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop_ids=self._stop_ids,
        )
        request = self._generator.add(prompt, params)
        with _Interrupt() as interrupt:
            while self._generator.has_work:
                if interrupt.came:
                    self._generator.cancel(request)
                for event in self._generator.step():
                    if (piece := answer.push(event)).text:
                        yield piece.text


class _Interrupt:
    """Inside, SIGINT only sets `came`: a step of the generator must not be torn apart."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, _: int, __: FrameType | None) -> None:
        self.came = True


def open_chat(
    path: str,
    *,
    adapter: str | None = None,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    seed: int | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
) -> Chat:
    """Load a model or run and begin a conversation. Raises UserError for whatever does not load."""
    SamplingParams(temperature=temperature, top_p=top_p)
    opened = open_served(path, adapter=adapter, merge=True, precision=precision)
    return Chat(opened, system, temperature, top_p, max_tokens, seed)
