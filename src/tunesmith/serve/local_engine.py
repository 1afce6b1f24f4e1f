"""The embedded engine: a thread that steps a Generator, and streams that an event loop reads.

The thread owns the generator; the event loop talks to it through a queue of commands, and hears from it
once a step, with all events of that step together.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tunesmith.core.progress import say
from tunesmith.model.generate import Generator, TokenEvent
from tunesmith.model.sampling import SamplingParams
from tunesmith.serve.engine import EngineBusy, EngineError, EngineStatus, Prompt

Command = Callable[[], None]
Indexed = tuple[int, TokenEvent]


@dataclass(eq=False)
class LocalStream:
    """Events of one submission; read and cancelled on the event loop that submitted it."""

    engine: LocalEngine
    loop: asyncio.AbstractEventLoop
    open: set[int]
    ids: dict[int, int] = field(default_factory=dict)
    _arrived: list[Indexed] = field(default_factory=list)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _failure: str | None = None

    async def __aiter__(self) -> AsyncIterator[list[Indexed]]:
        while self.open or self._arrived or self._failure:
            await self._wake.wait()
            self._wake.clear()
            arrived, self._arrived = self._arrived, []
            if arrived:
                yield arrived
            if self._failure:
                raise EngineError(self._failure)

    def cancel(self, index: int | None = None) -> None:
        gone = [i for i in (list(self.open) if index is None else [index]) if i in self.open]
        self.open.difference_update(gone)
        if gone:
            self.engine.cancel(self, gone)
        self._wake.set()

    def deliver(self, events: list[Indexed]) -> None:
        for index, event in events:
            if index in self.open:
                self._arrived.append((index, event))
                if event.finish_reason is not None:
                    self.open.discard(index)
        self._wake.set()

    def fail(self, reason: str) -> None:
        self._failure = reason
        self._wake.set()


class LocalEngine:
    """Steps `generator` in a thread of its own.

    max_waiting: most requests in line beyond those computed; more are refused with EngineBusy.
    """

    def __init__(self, generator: Generator, *, max_waiting: int = 1024) -> None:
        self._generator = generator
        self._max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._streams: dict[int, tuple[LocalStream, int]] = {}
        # Each counter is written by one thread only: the event loop's and the engine's.
        self._submitted = self._taken = 0
        self._ready = self._closing = self._stopped = False
        self._failure: str | None = None
        self._finished = self._cancelled = self._generated_tokens = 0
        self._thread = threading.Thread(target=self._run, name="tunesmith-engine", daemon=True)

    def start(self, warm_up: Prompt) -> None:
        """Start the thread; it becomes ready when it has generated a token after `warm_up`."""
        self._commands.put(lambda: self._warm_up(warm_up))
        self._thread.start()

    def status(self) -> EngineStatus:
        alive = self._failure is None and not self._stopped and self._thread.is_alive()
        return EngineStatus(
            alive=alive,
            ready=alive and self._ready and not self._closing,
            running=self._generator.num_running,
            waiting=self._generator.num_waiting,
            finished=self._finished,
            cancelled=self._cancelled,
            generated_tokens=self._generated_tokens,
            failure=self._failure,
        )

    def submit(self, requests: Sequence[tuple[Prompt, SamplingParams]]) -> LocalStream:
        if self._closing or not self.status().alive:
            raise EngineError(self._failure or "the server is shutting down")
        if self._in_line() + len(requests) > self._max_waiting:
            raise EngineBusy(f"{self._in_line()} requests are waiting already")
        for prompt, params in requests:
            self._generator.check(prompt, params)
        stream = LocalStream(self, asyncio.get_running_loop(), set(range(len(requests))))
        self._submitted += len(requests)
        self._commands.put(lambda: self._add(stream, list(requests)))
        return stream

    def _in_line(self) -> int:
        return self._generator.num_waiting + self._submitted - self._taken

    def cancel(self, stream: LocalStream, indices: list[int]) -> None:
        """Called by a stream, on its loop."""
        self._commands.put(lambda: self._cancel(stream, indices))

    def close(self, *, grace_s: float) -> None:
        self._closing = True
        end = time.monotonic() + grace_s
        while (
            (self._streams or self._submitted > self._taken)
            and self.status().alive
            and time.monotonic() < end
        ):
            time.sleep(0.02)
        self._commands.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(10.0)

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._obey(wait=not self._generator.has_work)
                if self._generator.has_work:
                    self._publish(self._generator.step())
        except BaseException as error:
            self._failure = f"the engine stopped: {type(error).__name__}: {error}"
            say(traceback.format_exc())
        self._fail_all(self._failure or "the server is shutting down")

    def _obey(self, *, wait: bool) -> None:
        if wait:
            self._commands.get()()
        while not self._stopped:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _warm_up(self, prompt: Prompt) -> None:
        self._generator.add(prompt, SamplingParams(max_new_tokens=2))
        while self._generator.has_work:
            if any(event.finish_reason == "error" for event in self._generator.step()):
                raise EngineError("the model's logits are not finite")
        self._ready = True

    def _add(self, stream: LocalStream, requests: Iterable[tuple[Prompt, SamplingParams]]) -> None:
        for index, (prompt, params) in enumerate(requests):
            stream.ids[index] = request_id = self._generator.add(prompt, params)
            self._streams[request_id] = (stream, index)
            self._taken += 1

    def _cancel(self, stream: LocalStream, indices: list[int]) -> None:
        for index in indices:
            request_id = stream.ids[index]
            if self._streams.pop(request_id, None) is not None:
                self._generator.cancel(request_id)
                self._cancelled += 1

    def _publish(self, events: list[TokenEvent]) -> None:
        """Hand each loop all of its events of a step in one call."""
        grouped: dict[asyncio.AbstractEventLoop, dict[LocalStream, list[Indexed]]] = {}
        for event in events:
            self._generated_tokens += event.token_id is not None
            owner = self._streams.get(event.request_id)
            if owner is None:
                continue
            stream, index = owner
            grouped.setdefault(stream.loop, {}).setdefault(stream, []).append((index, event))
            if event.finish_reason is not None:
                del self._streams[event.request_id]
                self._finished += 1
        for loop, streams in grouped.items():
            _call(loop, partial(_deliver, streams))

    def _fail_all(self, reason: str) -> None:
        streams = {stream for stream, _ in self._streams.values()}
        self._streams.clear()
        for stream in streams:
            _call(stream.loop, partial(stream.fail, reason))

    def _stop(self) -> None:
        self._stopped = True


def _deliver(streams: dict[LocalStream, list[Indexed]]) -> None:
    for stream, events in streams.items():
        stream.deliver(events)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return  # The loop has ended, and with it whoever waited.
