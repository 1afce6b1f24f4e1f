"""The other side of `process_engine`: an engine that answers what comes through a socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.serve import wire
from tunesmith.serve.engine import AnswerStream, Engine, EngineError

STATUS_EVERY_S = 0.25


async def serve_engine(engine: Engine, connection: socket.socket, facts: Mapping[str, Any]) -> None:
    """Until it is told to close. Ends this process at once when the other side is gone.

    facts: plain data about the engine, told when it is ready; max_length and vocab_size are among them.
    """
    reader, writer = await asyncio.open_connection(sock=connection)
    server = _Server(engine, writer)
    server.send("ready", facts=dict(facts), status=wire.status_to_plain(engine.status()))
    watching = asyncio.create_task(server.watch())
    while (message := await wire.read_async(reader)) is not None:
        if message["kind"] == "close":
            await server.close(message["grace_s"])
            watching.cancel()
            writer.close()
            await writer.wait_closed()
            return
        server.obey(message)
    # Nobody hears us any more; the engine's thread may be in the middle of a step.
    os._exit(0)


class _Server:
    def __init__(self, engine: Engine, writer: asyncio.StreamWriter) -> None:
        self._engine, self._writer = engine, writer
        self._streams: dict[int, AnswerStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: list[tuple[int, int, Any]] = []
        self._answer_complete = False
        self._calls: dict[str, Callable[[wire.Message], Awaitable[Any]]] = {
            "embed": lambda m: engine.embed(m["prompts"], m["adapter"]),
            "load_adapter": lambda m: engine.load_adapter(m["name"], Path(m["folder"])),
            "unload_adapter": lambda m: engine.unload_adapter(m["name"]),
        }

    def send(self, kind: str, **content: Any) -> None:
        self._writer.write(wire.encode(kind, **content))

    def _status(self) -> wire.Message:
        return wire.status_to_plain(self._engine.status())

    def obey(self, message: wire.Message) -> None:
        kind = message["kind"]
        if kind == "submit":
            self._submit(message)
        elif kind == "cancel":
            if stream := self._streams.get(message["stream"]):
                for index in message["indices"]:
                    stream.cancel(index)
        else:
            self._start(self._call(message))

    async def watch(self) -> None:
        """Tell the status now and then: it says too that this process still turns."""
        while True:
            await asyncio.sleep(STATUS_EVERY_S)
            status = self._engine.status()
            self.send("status", status=wire.status_to_plain(status))
            if not status.alive:
                self.send("broken", reason=status.failure or "the engine ended")

    async def close(self, grace_s: float) -> None:
        """Give the requests `grace_s` seconds, and the other side their last events."""
        await asyncio.to_thread(self._engine.close, grace_s=grace_s)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        self._flush()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _submit(self, message: wire.Message) -> None:
        number = message["stream"]
        try:
            stream = self._engine.submit([wire.ask_from(plain) for plain in message["asks"]])
        except (UserError, EngineError) as error:
            self.send("refused", stream=number, error=wire.error_to_plain(error))
            return
        self._streams[number] = stream
        self._start(self._relay(number, stream))

    async def _relay(self, number: int, stream: AnswerStream) -> None:
        try:
            async for batch in stream:
                self._add(number, batch)
        except (UserError, EngineError) as error:
            self._flush()
            self.send("refused", stream=number, error=wire.error_to_plain(error))
        finally:
            del self._streams[number]

    def _add(self, number: int, batch: list[tuple[int, Any]]) -> None:
        """A step's events wake all of its streams together: those that follow go into the same frame."""
        if not self._events:
            asyncio.get_running_loop().call_soon(self._flush)
        for index, event in batch:
            self._events.append((number, index, event))
            self._answer_complete |= event.finish_reason is not None

    def _flush(self) -> None:
        if not self._events:
            return
        more = {"status": self._status()} if self._answer_complete else {}
        self.send("events", events=self._events, **more)
        self._events, self._answer_complete = [], False

    async def _call(self, message: wire.Message) -> None:
        number = message["call"]
        try:
            value = await self._calls[message["kind"]](message)
        except Exception as error:
            self.send("done", call=number, error=wire.error_to_plain(error))
        else:
            self.send("done", call=number, value=value, status=self._status())
