"""An engine in a process of its own: its Python never waits for ours, and its end is not ours.

The other side is `engine_server`. A thread starts the process and hears from it; another one speaks to it,
so that no event loop ever waits for the process.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from tunesmith.core import proc
from tunesmith.model.limits import Limits, check_adapter
from tunesmith.serve import wire
from tunesmith.serve.engine import Ask, EngineBusy, EngineError, EngineStatus, Prompt
from tunesmith.serve.streams import Indexed, QueuedStream, call_on, deliver_all

SILENCE_S = 30.0
END_S = 5.0
CLOSING = "the server is shutting down"
NOTHING = EngineStatus(
    alive=True, ready=False, running=0, waiting=0, finished=0, cancelled=0, generated_tokens=0
)


@dataclass(eq=False)
class _Asked:
    """A stream and the indices of its answers that are not complete."""

    stream: QueuedStream
    left: set[int] = field(default_factory=set)


class ProcessEngine:
    """`command`, with the number of a socket as its last argument, is the engine.

    description: plain data that says what it loads. max_waiting: most requests in line beyond those that it
    computes at once; more are refused with EngineBusy.
    """

    def __init__(
        self,
        command: Sequence[str],
        description: Mapping[str, Any],
        *,
        max_waiting: int = 1024,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._command, self._description, self._env = command, description, env
        self._max_waiting = max_waiting
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._calls: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]] = {}
        # Guards what both the event loops and the thread that hears from the process add to and end.
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process: proc.Process | None = None
        self._status, self._heard = NOTHING, time.monotonic()
        self._facts: dict[str, Any] | None = None
        self._limits = Limits(0, 0)
        self._failure: str | None = None
        self._load_error: Exception | None = None
        self._closing = False
        self._answered, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tunesmith-engine-reader", daemon=True)

    @property
    def pid(self) -> int | None:
        """Of the process, once it has been started."""
        return self._process.pid if self._process else None

    def start(self) -> dict[str, Any]:
        """Start the process, wait until it has generated a token; the facts that it tells of itself.

        Raises the error that it met while it loaded, EngineError when it ended or was closed meanwhile.
        """
        self._thread.start()
        self._answered.wait()
        if self._facts is None:
            raise self._load_error or EngineError(self._failure or CLOSING)
        return self._facts

    def status(self) -> EngineStatus:
        """What the process said last, with what is known here: how many answers are not complete."""
        told, alive = self._status, self._failure is None and self._thread.is_alive()
        fresh = time.monotonic() - self._heard < SILENCE_S
        open_ = self._open()
        running = min(told.running, open_)
        return replace(
            told,
            alive=alive,
            ready=alive and fresh and told.ready and self._facts is not None and not self._closing,
            running=running,
            waiting=open_ - running,
            failure=self._failure,
        )

    def submit(self, asks: Sequence[Ask]) -> QueuedStream:
        self._check(asks)
        number = next(self._numbers)
        stream = QueuedStream(len(asks), lambda gone: self._cancel(number, gone))
        with self._lock:
            self._refuse_when_over()
            self._asked[number] = _Asked(stream, set(range(len(asks))))
        self._send("submit", stream=number, asks=[wire.ask_to_plain(ask) for ask in asks])
        return stream

    async def embed(self, prompts: Sequence[Prompt], adapter: str | None = None) -> list[list[float]]:
        for prompt in prompts:
            self._limits.check(prompt)
        found: list[list[float]] = await self._call(
            "embed", prompts=[list(prompt) for prompt in prompts], adapter=adapter
        )
        return found

    async def load_adapter(self, name: str, folder: Path) -> None:
        await self._call("load_adapter", name=name, folder=str(folder))

    async def unload_adapter(self, name: str) -> None:
        await self._call("unload_adapter", name=name)

    def close(self, *, grace_s: float) -> None:
        self._closing = True
        if self._facts is not None:
            self._send("close", grace_s=grace_s)
            self._ended.wait(grace_s + END_S)
        self._kill()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._ended.wait(END_S)
        self._answered.set()

    def abandon(self, reason: str) -> None:
        """End the process at once; its requests end with an error that says why."""
        with self._lock:
            self._failure = self._failure or reason
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    # -- towards the process -------------------------------------------------------------------------

    def _check(self, asks: Sequence[Ask]) -> None:
        if self._open() + len(asks) > self._max_waiting + self._description["max_concurrent"]:
            raise EngineBusy(f"{self.status().waiting} requests are waiting already")
        known = self._status.adapters
        for ask in asks:
            params = ask.params
            self._limits.check(ask.prompt, max_new_tokens=params.max_new_tokens, biased=params.logit_bias)
            check_adapter(ask.adapter, known)

    def _refuse_when_over(self) -> None:
        if self._failure is not None or self._closing or self._facts is None:
            raise EngineError(self._failure or (CLOSING if self._closing else "the engine is not ready yet"))

    def _open(self) -> int:
        return sum(len(asked.left) for asked in list(self._asked.values()))

    def _cancel(self, number: int, indices: list[int]) -> None:
        """Called by a stream, on its loop."""
        asked = self._asked.get(number)
        if asked is not None:
            self._finish(number, asked, indices)
            self._send("cancel", stream=number, indices=indices)

    async def _call(self, kind: str, **content: Any) -> Any:
        loop, number = asyncio.get_running_loop(), next(self._numbers)
        answer: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            self._refuse_when_over()
            self._calls[number] = loop, answer
        self._send(kind, call=number, **content)
        return await answer

    def _send(self, kind: str, **content: Any) -> None:
        self._outgoing.put(wire.encode(kind, **content))

    def _speak(self, connection: socket.socket) -> None:
        with suppress(OSError):  # The process has ended; the thread that hears from it knows.
            while (frame := self._outgoing.get()) is not None:
                connection.sendall(frame)

    # -- from the process: all below runs in the thread that hears from it ----------------------------

    def _run(self) -> None:
        # This thread lives as long as the process: the signal that the process asked for when its parent
        # dies (PR_SET_PDEATHSIG) comes when the thread that started it ends.
        ours, theirs = socket.socketpair()
        reason = "the engine's process could not be started"
        try:
            with theirs:
                number = theirs.fileno()
                process = proc.start_linked([*self._command, str(number)], link=number, env=self._env)
            self._process = process
            if self._closing:
                process.kill()
            reason = self._converse(ours, process)
        except Exception as error:
            reason = f"{reason}: {error}"
            self._kill()
        finally:
            self._end(reason)
            ours.close()

    def _converse(self, connection: socket.socket, process: proc.Process) -> str:
        """Until the process ends; how it ended."""
        speaker = threading.Thread(
            target=self._speak, args=(connection,), name="tunesmith-engine-writer", daemon=True
        )
        speaker.start()
        self._send("load", **self._description)
        try:
            with connection.makefile("rb") as file:
                self._hear(file)
        except OSError:
            pass
        finally:
            self._outgoing.put(None)
        return _how_it_ended(process, asked_to=self._closing)

    def _hear(self, file: IO[bytes]) -> None:
        acts: dict[str, Callable[[wire.Message], None]] = {
            "ready": self._ready,
            "failed": self._failed_to_load,
            "events": self._events,
            "status": self._heard_status,
            "done": self._done,
            "refused": self._refused,
            "broken": self._broken,
        }
        while (message := wire.read(file)) is not None:
            acts[message["kind"]](message)

    def _ready(self, message: wire.Message) -> None:
        facts = message["facts"]
        self._heard_status(message)
        capacity = self._status.cache_capacity
        self._limits = Limits(facts["max_length"], facts["vocab_size"], capacity)
        self._facts = facts
        self._answered.set()

    def _failed_to_load(self, message: wire.Message) -> None:
        self._load_error = wire.error_from(message["error"])

    def _heard_status(self, message: wire.Message) -> None:
        self._status, self._heard = wire.status_from(message["status"]), time.monotonic()

    def _events(self, message: wire.Message) -> None:
        """Hand each loop all of its events of a step in one call."""
        if "status" in message:
            self._heard_status(message)
        grouped: dict[asyncio.AbstractEventLoop, dict[QueuedStream, list[Indexed]]] = {}
        for number, index, values in message["events"]:
            asked = self._asked.get(number)
            if asked is None:
                continue
            event = wire.event_from(values)
            stream = asked.stream
            grouped.setdefault(stream.loop, {}).setdefault(stream, []).append((index, event))
            if event.finish_reason is not None:
                self._finish(number, asked, [index])
        for loop, streams in grouped.items():
            call_on(loop, partial(deliver_all, streams))

    def _finish(self, number: int, asked: _Asked, indices: list[int]) -> None:
        asked.left.difference_update(indices)
        if not asked.left:
            self._asked.pop(number, None)

    def _done(self, message: wire.Message) -> None:
        if "status" in message:
            self._heard_status(message)
        found = self._calls.pop(message["call"], None)
        if found is None:
            return
        loop, answer = found
        error = wire.error_from(message["error"]) if message.get("error") else None
        call_on(loop, partial(_answer, answer, message.get("value"), error))

    def _refused(self, message: wire.Message) -> None:
        asked = self._asked.pop(message["stream"], None)
        if asked is not None:
            call_on(asked.stream.loop, partial(asked.stream.fail, wire.error_from(message["error"])))

    def _broken(self, message: wire.Message) -> None:
        """The engine inside has ended, the process has not yet."""
        with self._lock:
            self._failure = self._failure or message["reason"]

    def _end(self, reason: str) -> None:
        with self._lock:
            self._failure = failure = self._failure or reason
            asked, self._asked = list(self._asked.values()), {}
            calls, self._calls = list(self._calls.values()), {}
        for one in asked:
            call_on(one.stream.loop, partial(one.stream.fail, failure))
        for loop, answer in calls:
            call_on(loop, partial(_answer, answer, None, EngineError(failure)))
        self._answered.set()
        self._ended.set()


def _how_it_ended(process: proc.Process, *, asked_to: bool) -> str:
    """Waits for it, so that nothing is left of it."""
    code = proc.stop(process, grace_s=END_S)
    if asked_to:
        return CLOSING
    if code < 0:
        more = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"the engine's process was ended by {signal.Signals(-code).name}{more}"
    return f"the engine's process ended with code {code}"


def _answer(answer: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if answer.done():  # nobody waits for it any more
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(value)
