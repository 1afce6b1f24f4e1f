"""What is asked of whoever speaks to one kind of server program, and what is asked of all such programs."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tunesmith.core.errors import UserError
from tunesmith.core.net import EventClient
from tunesmith.model.requests import FinishReason, Logprobs, SamplingParams, TokenEvent
from tunesmith.serve.engine import Ask, Prompt

PROBE_TOKENS, PROBE_LOGPROBS = 4, 5


@dataclass(frozen=True, slots=True)
class Command:
    """A program and its environment beyond ours. Keys belong into `env`: everyone can read arguments."""

    args: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class Driver(Protocol):
    """Speaks to one kind of server."""

    name: str
    health: str
    """Path that answers 200 once the model is loaded."""

    def command(self, port: int, key: str) -> Command: ...

    def check(self, ask: Ask) -> None:
        """Raise UserError for what this server cannot do, or not as asked."""
        ...

    async def prepare(self, client: EventClient) -> None:
        """Called after every start, before the first request."""
        ...

    def answer(self, client: EventClient, ask: Ask) -> AsyncGenerator[TokenEvent, None]:
        """The events of one answer, until the one with a finish_reason. Raises NetError, EngineError."""
        ...

    @property
    def adapters(self) -> tuple[str, ...]: ...

    async def load_adapter(self, client: EventClient, name: str, folder: Path) -> None: ...

    async def unload_adapter(self, client: EventClient, name: str) -> None: ...


def finish_of(ask: Ask, token_id: int, count: int) -> FinishReason | None:
    """Whether an answer ends with its `count`th token: by a stop token, or because it has all it may."""
    if token_id in ask.params.stop_ids:
        return "stop"
    return "length" if count >= ask.params.max_new_tokens else None


async def check_adapters(driver: Driver, client: EventClient, probe: Prompt, names: Sequence[str]) -> None:
    """Raise UserError for an adapter that the program has loaded, and that changes nothing there."""
    if not names:
        return
    base, again = [await _told(driver, client, probe, None) for _ in range(2)]
    for name in names:
        if _gap(await _told(driver, client, probe, name), base) <= _gap(again, base):
            raise UserError(
                f"{driver.name}: with the adapter '{name}' it answers as the base model does",
                hint="train it for more steps, or use the local engine, which says what does not fit",
            )


async def _told(driver: Driver, client: EventClient, probe: Prompt, adapter: str | None) -> list[Logprobs]:
    """Of a few greedy tokens after the probe, with those that came next."""
    params = SamplingParams(max_new_tokens=PROBE_TOKENS, logprobs=PROBE_LOGPROBS)
    async with aclosing(driver.answer(client, Ask(probe, params, adapter))) as answer:
        return [event.logprobs async for event in answer if event.logprobs is not None]


def _gap(one: Sequence[Logprobs], other: Sequence[Logprobs]) -> float:
    """The largest difference of a token's log-probability; infinite where other tokens come at all."""
    if [entry.token_id for entry in one] != [entry.token_id for entry in other]:
        return math.inf
    pairs = [(dict(mine.top), dict(yours.top)) for mine, yours in zip(one, other, strict=True)]
    return max((abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()), default=0.0)
