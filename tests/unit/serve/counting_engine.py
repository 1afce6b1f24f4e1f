"""An engine without a model, for tests of what stands around engines: it counts on from the prompt's end.

As a program it is the other side of a ProcessEngine: `python -m tests.unit.serve.counting_engine SOCKET`.
Some prompts break it: DIE ends the process, HANG is never answered and nothing after it is, REFUSE is
refused late, as a grammar that does not compile would be.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.model.requests import Logprobs, TokenEvent
from tunesmith.serve import wire
from tunesmith.serve.engine import Ask, EngineError, EngineStatus, Prompt
from tunesmith.serve.engine_server import serve_engine
from tunesmith.serve.streams import QueuedStream

DIE, HANG, REFUSE = 900, 901, 902
STEP_S = 0.002
FACTS = {"max_length": 1000, "vocab_size": 1000}


class CountingEngine:
    def __init__(self) -> None:
        self._open: set[tuple[QueuedStream, int]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._adapters: dict[str, str] = {}
        self._finished = self._cancelled = self._tokens = 0
        self._closing = self._hangs = False

    def submit(self, asks: Sequence[Ask]) -> QueuedStream:
        if self._closing:
            raise EngineError("the server is shutting down")
        if any(ask.prompt[0] == REFUSE for ask in asks):
            raise UserError("the engine does not like this", hint="ask for something else")
        stream = QueuedStream(len(asks), lambda gone: self._cancel(stream, gone))
        for index, ask in enumerate(asks):
            self._open.add((stream, index))
            task = asyncio.create_task(self._count(stream, index, ask))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return stream

    async def _count(self, stream: QueuedStream, index: int, ask: Ask) -> None:
        if ask.prompt[0] == DIE:
            os._exit(3)
        self._hangs |= ask.prompt[0] == HANG
        start = ask.prompt[-1]
        if ask.adapter is not None:
            start += 100 * (1 + list(self._adapters).index(ask.adapter))
        for number in range(1, ask.params.max_new_tokens + 1):
            await asyncio.sleep(STEP_S)
            while self._hangs:
                await asyncio.sleep(STEP_S)
            if (stream, index) not in self._open:
                return
            last = number == ask.params.max_new_tokens
            found = Logprobs(start + number, -0.5, ((1, -0.5), (2, -1.5)))
            event = TokenEvent(
                number, start + number, "length" if last else None, found, (found,) * (number == 1)
            )
            self._tokens += 1
            if last:
                self._open.discard((stream, index))
                self._finished += 1
            stream.deliver([(index, event)])

    def _cancel(self, stream: QueuedStream, gone: list[int]) -> None:
        self._open -= {(stream, index) for index in gone}
        self._cancelled += len(gone)

    async def embed(self, prompts: Sequence[Prompt], adapter: str | None = None) -> list[list[float]]:
        if adapter == "broken":
            raise ValueError("a fault of its own")
        return [[float(len(prompt)), 0.5] for prompt in prompts]

    async def load_adapter(self, name: str, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: does not fit", hint="take another")
        self._adapters[name] = str(folder)

    async def unload_adapter(self, name: str) -> None:
        if name not in self._adapters:
            raise UserError(f"no adapter '{name}' is loaded")
        del self._adapters[name]

    def status(self) -> EngineStatus:
        return EngineStatus(
            alive=True,
            ready=not self._closing,
            running=min(len(self._open), 2),
            waiting=max(0, len(self._open) - 2),
            finished=self._finished,
            cancelled=self._cancelled,
            generated_tokens=self._tokens,
            adapters=tuple(self._adapters),
        )

    def close(self, *, grace_s: float) -> None:
        self._closing = True
        end = time.monotonic() + grace_s
        while self._open and time.monotonic() < end:
            time.sleep(STEP_S)
        for stream in {stream for stream, _ in self._open}:
            stream.loop.call_soon_threadsafe(stream.fail, "the server is shutting down")


def main(number: int) -> None:
    connection = socket.socket(fileno=number)
    wanted = wire.receive(connection)
    assert wanted is not None
    if wanted.get("fault"):
        error = UserError("no such model", hint="give another")
        connection.sendall(wire.encode("failed", error=wire.error_to_plain(error)))
        sys.exit(1)
    engine = CountingEngine()
    engine._adapters.update(wanted.get("adapters", {}))
    facts = FACTS | {"adapters": wanted.get("adapters", {}), "probe": [5], "pid": os.getpid()}
    asyncio.run(serve_engine(engine, connection, facts))


if __name__ == "__main__":
    main(int(sys.argv[1]))
