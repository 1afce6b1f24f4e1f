"""What the gateway asks of whatever computes the answers.

The gateway speaks HTTP, renders templates and turns tokens into text; an engine turns token ids into
token ids. `local_engine` computes in this process; others speak to a program of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tunesmith.model.requests import SamplingParams, TokenEvent

Prompt = Sequence[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt to continue; adapter: the name it was loaded under, None for the base model."""

    prompt: Prompt
    params: SamplingParams
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """alive: it can still compute; ready: it has a model and has produced a token with it.

    cancelled counts answers ended before they were complete (disconnects, stop strings); failure says
    why it is no longer alive. cached_tokens: prompt tokens that were not computed because a cache page had
    them; preempted: times that a request gave up its cache pages for others. cache_tokens of
    cache_capacity are in use; capacity 0: unknown. restarts: how often the engine's process was started
    again after it had died.
    """

    alive: bool
    ready: bool
    running: int
    waiting: int
    finished: int
    cancelled: int
    generated_tokens: int
    failure: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preempted: int = 0
    cache_tokens: int = 0
    cache_capacity: int = 0
    restarts: int = 0
    adapters: tuple[str, ...] = ()


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
    def submit(self, asks: Sequence[Ask]) -> AnswerStream:
        """Begin to answer. Raises EngineError when it cannot, UserError for a bad prompt or adapter."""
        ...

    async def embed(self, prompts: Sequence[Prompt], adapter: str | None = None) -> list[list[float]]:
        """The mean of each prompt's final hidden states, of length 1. Raises EngineError and UserError."""
        ...

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Make a LoRA adapter answer under `name` from now on; a name that is taken gets the new one.

        Raises UserError, with the reason, for one that does not fit the base model.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it are finished first. Raises UserError for unknown names."""
        ...

    def status(self) -> EngineStatus: ...

    def close(self, *, grace_s: float) -> None:
        """Take no more requests, give those running `grace_s` seconds, then end them and the engine."""
        ...
