"""What the gateway asks of whatever computes the answers.

The gateway speaks HTTP, renders templates and turns tokens into text; an engine turns token ids into
token ids. `local_engine` computes in this process; others may speak to a program of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tunesmith.model.generate import TokenEvent
from tunesmith.model.sampling import SamplingParams

Prompt = Sequence[int]


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """alive: it can still compute; ready: it has a model and has produced a token with it.

    cancelled counts answers ended before they were complete (disconnects, stop strings); failure says
    why it is no longer alive.
    """

    alive: bool
    ready: bool
    running: int
    waiting: int
    finished: int
    cancelled: int
    generated_tokens: int
    failure: str | None = None


class EngineError(Exception):
    """The engine cannot answer (any more)."""


class EngineBusy(EngineError):
    """Too many requests are in line; try again later."""


class AnswerStream(Protocol):
    """The answers to some prompts, as they come."""

    def __aiter__(self) -> AsyncIterator[list[tuple[int, TokenEvent]]]:
        """Lists of (index of the prompt, event), until every prompt's last event. Raises EngineError."""
        ...

    def cancel(self, index: int | None = None) -> None:
        """End one prompt's answer, or all, at the next step; nothing more is said of it."""
        ...


class Engine(Protocol):
    def submit(self, requests: Sequence[tuple[Prompt, SamplingParams]]) -> AnswerStream:
        """Begin to answer. Raises EngineError when it cannot, UserError for a bad prompt."""
        ...

    def status(self) -> EngineStatus: ...

    def close(self, *, grace_s: float) -> None:
        """Take no more requests, give those running `grace_s` seconds, then end them and the engine."""
        ...
