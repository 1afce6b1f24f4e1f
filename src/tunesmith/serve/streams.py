"""Events on their way from an engine to the event loop that asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from tunesmith.model.requests import TokenEvent
from tunesmith.serve.engine import EngineError

Indexed = tuple[int, TokenEvent]


class QueuedStream:
    """The answers to `count` prompts; every method is called on the event loop that made it.

    on_cancel: told the indices of answers that nobody waits for any more.
    """

    def __init__(self, count: int, on_cancel: Callable[[list[int]], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.open = set(range(count))
        self._on_cancel = on_cancel
        self._arrived: list[Indexed] = []
        self._wake = asyncio.Event()
        self._failure: Exception | None = None

    async def __aiter__(self) -> AsyncIterator[list[Indexed]]:
        while self.open or self._arrived or self._failure:
            await self._wake.wait()
            self._wake.clear()
            arrived, self._arrived = self._arrived, []
            if arrived:
                yield arrived
            if self._failure:
                raise self._failure

    def cancel(self, index: int | None = None) -> None:
        gone = [i for i in (sorted(self.open) if index is None else [index]) if i in self.open]
        self.open.difference_update(gone)
        if gone:
            self._on_cancel(gone)
        self._wake.set()

    def deliver(self, events: list[Indexed]) -> None:
        for index, event in events:
            if index in self.open:
                self._arrived.append((index, event))
                if event.finish_reason is not None:
                    self.open.discard(index)
        self._wake.set()

    def fail(self, why: str | Exception) -> None:
        """End it with an error: this one, or an EngineError that says `why`."""
        self._failure = EngineError(why) if isinstance(why, str) else why
        self._wake.set()


S = TypeVar("S", bound=QueuedStream)


def deliver_all(streams: Mapping[S, list[Indexed]]) -> None:
    """What one step has for the streams of a loop, in one call on that loop."""
    for stream, events in streams.items():
        stream.deliver(events)


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """From any thread. A loop that has ended is passed over: with it ended whoever waited."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)
