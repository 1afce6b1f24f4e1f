"""The embedded engine: a thread that steps a Generator, and streams that an event loop reads.

That thread owns the generator; the event loop talks to it through a queue of commands, which it obeys between
steps, and hears from it once a step, with all events of that step together.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.adapter_slots import Adapter
from tunesmith.model.generate import Generator
from tunesmith.model.limits import check_adapter
from tunesmith.model.requests import SamplingParams, TokenEvent
from tunesmith.serve.engine import Ask, EngineBusy, EngineError, EngineStatus, Prompt
from tunesmith.serve.streams import Indexed, QueuedStream, call_on, deliver_all

Command = Callable[[], None]


class LocalStream(QueuedStream):
    """Knows of its requests the numbers that the generator gave them, and how many are left."""

    def __init__(self, engine: LocalEngine, count: int) -> None:
        super().__init__(count, lambda gone: engine.cancel(self, gone))
        self.ids: dict[int, int] = {}
        self.num_left = count


class _Call:
    """Something that a coroutine asked of the engine's thread and waits for."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    def done(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def refuse(self, error: UserError) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def fail(self, reason: str) -> None:
        if not self.future.done():
            self.future.set_exception(EngineError(reason))


class _Embedding:
    """Prompts to embed, one at each turn of the engine's thread."""

    def __init__(self, call: _Call, prompts: Sequence[Prompt], key: str | None) -> None:
        self.call, self.key, self.num_prompts = call, key, len(prompts)
        self.prompts: Iterator[Prompt] = iter(prompts)
        self.found: list[list[float]] = []


class LocalEngine:
    """Steps `generator` in a thread of its own (`start`), or in the one that is given to it (`run`).

    Adapters are those of the generator's bank; each loading has a key of its own there, so that requests
    keep the adapter that they began with when its name gets another. max_waiting: most requests in line
    beyond those computed; more are refused with EngineBusy.
    """

    def __init__(self, generator: Generator, *, max_waiting: int = 1024) -> None:
        self._generator = generator
        self._bank = generator.bank
        self._max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        # Held while something is put in line, so that nothing is after the thread's end or its adapter's.
        self._door = threading.Lock()
        self._keys = {name: name for name in self._bank.names} if self._bank else {}
        self._asking: set[LocalStream | _Call] = set()
        # Each counter is written by one thread only: the event loop's and the engine's.
        self._submitted = self._taken = 0
        self._ready = self._closing = self._stopped = False
        self._failure: str | None = None
        self._finished = self._cancelled = self._generated_tokens = 0
        # The engine's thread alone knows these: streams by request, keys in use, keys on their way out.
        self._streams: dict[int, tuple[LocalStream, int]] = {}
        self._using: dict[int, str] = {}
        self._embeddings: deque[_Embedding] = deque()
        self._retiring: dict[str, _Call | None] = {}
        self._ended = threading.Event()

    def start(self, warm_up: Prompt) -> None:
        """Start a thread; the engine becomes ready when it has generated a token after `warm_up`."""
        threading.Thread(target=self.run, args=(warm_up,), name="tunesmith-engine", daemon=True).start()

    def run(self, warm_up: Prompt) -> None:
        """Compute in this thread, until `close` is called in another.

        A process's first thread is the best one: libgomp lets the threads of any other wait for one another
        asleep (its count of threads is above that of the cores), a third of a small model's step.
        """
        try:
            self._warm_up(warm_up)
            while not self._stopped:
                self._turn()
        except BaseException as error:
            self._failure = f"the engine stopped: {type(error).__name__}: {error}"
            say(traceback.format_exc())
        with self._door:
            self._ended.set()
        self._fail_all(self._failure or "the server is shutting down")

    def status(self) -> EngineStatus:
        alive = self._failure is None and not self._stopped
        generator = self._generator
        return EngineStatus(
            alive=alive,
            ready=alive and self._ready and not self._closing,
            running=generator.num_running,
            waiting=generator.num_waiting,
            finished=self._finished,
            cancelled=self._cancelled,
            generated_tokens=self._generated_tokens,
            failure=self._failure,
            prompt_tokens=generator.prompt_tokens,
            cached_tokens=generator.cached_tokens,
            preempted=generator.preempted,
            cache_tokens=generator.cache_tokens_used,
            cache_capacity=generator.cache_capacity,
            adapters=tuple(self._keys),
        )

    def submit(self, asks: Sequence[Ask]) -> LocalStream:
        with self._door:
            self._check_open(len(asks))
            keys = [self._key(ask.adapter) for ask in asks]
            for ask, key in zip(asks, keys, strict=True):
                self._generator.check(ask.prompt, ask.params, key)
            stream = LocalStream(self, len(asks))
            self._submitted += len(asks)
            self._asking.add(stream)
            self._commands.put(lambda: self._add(stream, list(asks), keys))
        return stream

    async def embed(self, prompts: Sequence[Prompt], adapter: str | None = None) -> list[list[float]]:
        with self._door:
            self._check_open(1)
            key = self._key(adapter)
            call = self._call(lambda call: self._embeddings.append(_Embedding(call, prompts, key)))
        found: list[list[float]] = await call.future
        return found

    async def load_adapter(self, name: str, folder: Path) -> None:
        bank = self._own_bank()
        adapter = await asyncio.to_thread(bank.read, folder)
        with self._door:
            self._check_open(0)
            call = self._call(lambda call: self._put(name, bank, adapter, call))
        await call.future

    async def unload_adapter(self, name: str) -> None:
        with self._door:
            self._check_open(0)
            key = self._key(name)
            del self._keys[name]
            call = self._call(lambda call: self._retiring.update({str(key): call}))
        await call.future

    def cancel(self, stream: LocalStream, indices: list[int]) -> None:
        """Called by a stream, on its loop."""
        self._commands.put(lambda: self._cancel(stream, indices))

    def close(self, *, grace_s: float) -> None:
        self._closing = True
        end = time.monotonic() + grace_s
        while self._asking and self.status().alive and time.monotonic() < end:
            time.sleep(0.02)
        self._commands.put(self._stop)
        self._ended.wait(10.0)

    def _check_open(self, num_new: int) -> None:
        if self._closing or self._ended.is_set() or not self.status().alive:
            raise EngineError(self._failure or "the server is shutting down")
        in_line = self._generator.num_waiting + self._submitted - self._taken + len(self._embeddings)
        if num_new and in_line + num_new > self._max_waiting:
            raise EngineBusy(f"{in_line} requests are waiting already")

    def _key(self, name: str | None) -> str | None:
        if name is None:
            return None
        check_adapter(name, self._keys)
        return self._keys[name]

    def _own_bank(self) -> AdapterBank:
        if self._bank is None:
            raise UserError(
                "this engine takes no adapters: its model was opened to answer alone",
                hint="serve the base model, and load adapters beside it",
            )
        return self._bank

    def _call(self, command: Callable[[_Call], None]) -> _Call:
        call = _Call()
        self._asking.add(call)
        self._commands.put(lambda: command(call))
        return call

    # Everything below runs in the engine's thread.

    def _turn(self) -> None:
        self._obey(wait=not self._generator.has_work and not self._embeddings)
        if self._embeddings:
            self._embed_next(self._embeddings[0])
        if self._generator.has_work:
            self._publish(self._generator.step())
        if self._retiring:
            self._retire()

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

    def _add(self, stream: LocalStream, asks: Sequence[Ask], keys: Sequence[str | None]) -> None:
        for index, (ask, key) in enumerate(zip(asks, keys, strict=True)):
            stream.ids[index] = request_id = self._generator.add(ask.prompt, ask.params, adapter=key)
            self._streams[request_id] = (stream, index)
            if key is not None:
                self._using[request_id] = key
            self._taken += 1

    def _cancel(self, stream: LocalStream, indices: list[int]) -> None:
        for index in indices:
            request_id = stream.ids[index]
            if self._streams.pop(request_id, None) is not None:
                self._generator.cancel(request_id)
                self._cancelled += 1
                self._one_less(stream)

    def _embed_next(self, work: _Embedding) -> None:
        """One prompt, so that running answers wait for no more; nothing for a caller who has gone."""
        prompt = next(work.prompts, None)
        try:
            if prompt is not None and not work.call.future.done():
                work.found += self._generator.embed([prompt], work.key)
        except UserError as error:
            self._embeddings.popleft()
            self._answer(work.call, partial(work.call.refuse, error))
            return
        if len(work.found) == work.num_prompts or prompt is None or work.call.future.done():
            self._embeddings.popleft()
            self._answer(work.call, partial(work.call.done, work.found))

    def _put(self, name: str, bank: AdapterBank, adapter: Adapter, call: _Call) -> None:
        key = name
        while key in bank.names:
            key += "+"
        bank.put(key, adapter)
        with self._door:
            before = self._keys.get(name)
            self._keys[name] = key
        if before is not None:
            self._retiring[before] = None
        self._answer(call, partial(call.done, None))

    def _retire(self) -> None:
        """Unload the adapters that nobody uses any more."""
        used = {*self._using.values(), *(work.key for work in self._embeddings)}
        for key in self._retiring.keys() - used:
            call = self._retiring.pop(key)
            self._own_bank().unload(key)
            if call is not None:
                self._answer(call, partial(call.done, None))

    def _publish(self, events: list[TokenEvent]) -> None:
        """Hand each loop all of its events of a step in one call."""
        grouped: dict[asyncio.AbstractEventLoop, dict[LocalStream, list[Indexed]]] = defaultdict(dict)
        for event in events:
            self._generated_tokens += event.token_id is not None
            if event.finish_reason is not None:
                self._using.pop(event.request_id, None)
            owner = self._streams.get(event.request_id)
            if owner is None:
                continue
            stream, index = owner
            grouped[stream.loop].setdefault(stream, []).append((index, event))
            if event.finish_reason is not None:
                del self._streams[event.request_id]
                self._finished += 1
                self._one_less(stream)
        for loop, streams in grouped.items():
            call_on(loop, partial(deliver_all, streams))

    def _one_less(self, stream: LocalStream) -> None:
        stream.num_left -= 1
        if stream.num_left == 0:
            self._asking.discard(stream)

    def _answer(self, call: _Call, how: Callable[[], None]) -> None:
        self._asking.discard(call)
        call_on(call.loop, how)

    def _fail_all(self, reason: str) -> None:
        for asking in list(self._asking):
            call_on(asking.loop, partial(asking.fail, reason))
        self._asking.clear()
        self._streams.clear()

    def _stop(self) -> None:
        self._stopped = True
