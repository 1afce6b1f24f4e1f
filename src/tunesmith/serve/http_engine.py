"""An engine that is a server program of others: started on loopback with a key of its own, and watched.

What the programs have in common is here; a `Driver` knows how one of them is started and what it is asked.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.net import EventClient, NetError, free_port, local_status
from tunesmith.core.progress import say
from tunesmith.model.limits import Limits, check_adapter
from tunesmith.model.requests import SamplingParams, TokenEvent
from tunesmith.serve.back_off import BackOff
from tunesmith.serve.driver import Driver, check_adapters
from tunesmith.serve.engine import Ask, EngineBusy, EngineError, EngineStatus, Prompt
from tunesmith.serve.streams import QueuedStream

POLL_S = 0.1
PROBE_EVERY_S = 60.0
PROBE_TIMEOUT_S = 120.0
MOST_FAILURES = 5
STEADY_S = 120.0  # a program that ran this long did start: its next end begins the back-off anew
CLOSING = "the server is shutting down"
# What the program says of a request that it will not answer; other statuses mean that it cannot.
REFUSALS = (400, 404, 413, 422)


class HttpEngine:
    """The program of `driver`, kept running; its output goes to the file `log`.

    probe: a prompt for the engine's own questions; it is ready when it has generated a token after it.
    max_concurrent: requests that it computes at once; max_waiting: most beyond those, else EngineBusy.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        probe: Prompt,
        limits: Limits,
        log: Path,
        max_concurrent: int,
        max_waiting: int = 1024,
        start_timeout_s: float = 900.0,
    ) -> None:
        self._driver, self._probe, self._limits, self._log = driver, list(probe), limits, log
        self._max_concurrent, self._max_waiting = max_concurrent, max_waiting
        self._start_timeout_s = start_timeout_s
        self._url, self._key = "", ""
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[str, EventClient]] = (
            weakref.WeakKeyDictionary()
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._process: proc.Process | None = None
        self._open = self._finished = self._cancelled = self._generated = self._prompt_tokens = 0
        self._last_event = time.monotonic()
        self._restarts = 0
        # Leaving: no more requests are taken. Closing: nobody waits for the program any more.
        self._ready = self._leaving = self._closing = False
        self._failure: str | None = None
        self._refused: UserError | None = None
        self._known = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"tunesmith-{driver.name}", daemon=True)

    @property
    def pid(self) -> int | None:
        """Of the program, once it has been started."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the program and wait until it has generated a token.

        Raises TunesmithError with the end of its log, UserError for an adapter that changes nothing there.
        """
        self._thread.start()
        self._known.wait()
        if self._refused is not None:
            raise self._refused
        if self._failure is not None:
            raise TunesmithError(self._failure, hint=f"its whole output is in {self._log}")

    def status(self) -> EngineStatus:
        alive = self._failure is None and not self._leaving and self._thread.is_alive()
        running = min(self._open, self._max_concurrent)
        return EngineStatus(
            alive=alive,
            ready=alive and self._is_up(),
            running=running,
            waiting=self._open - running,
            finished=self._finished,
            cancelled=self._cancelled,
            generated_tokens=self._generated,
            failure=self._failure,
            prompt_tokens=self._prompt_tokens,
            restarts=self._restarts,
            adapters=self._driver.adapters,
        )

    # -- on the event loops of those who ask -----------------------------------------------------------

    def submit(self, asks: Sequence[Ask]) -> QueuedStream:
        self._refuse_when_over()
        if self._open + len(asks) > self._max_waiting + self._max_concurrent:
            raise EngineBusy(f"{self.status().waiting} requests are waiting already")
        for ask in asks:
            params = ask.params
            self._limits.check(ask.prompt, max_new_tokens=params.max_new_tokens, biased=params.logit_bias)
            if params.logit_bias and params.repetition_penalty != 1:
                raise UserError(
                    f"logit_bias with repetition_penalty: {self._driver.name} applies them in another order",
                    hint="leave one of them out, or use the local engine",
                )
            check_adapter(ask.adapter, self._driver.adapters)
            self._driver.check(ask)
        tasks: list[asyncio.Task[None]] = []
        stream = QueuedStream(len(asks), lambda gone: self._cancel(tasks, gone))
        for index, ask in enumerate(asks):
            tasks.append(stream.loop.create_task(self._answer(stream, index, ask)))
        self._tasks.update(tasks)
        return stream

    def _refuse_when_over(self) -> None:
        if self._failure is not None or self._leaving:
            raise EngineError(self._failure or CLOSING)
        if not self._is_up():
            raise EngineError(f"{self._driver.name} is starting; try again soon")

    def _is_up(self) -> bool:
        return self._ready and self._process is not None and self._process.poll() is None

    def _cancel(self, tasks: list[asyncio.Task[None]], indices: list[int]) -> None:
        self._cancelled += len(indices)
        for index in indices:
            tasks[index].cancel()

    async def _answer(self, stream: QueuedStream, index: int, ask: Ask) -> None:
        self._open += 1
        self._prompt_tokens += len(ask.prompt)
        try:
            async with aclosing(self._events(ask)) as events:
                async for event in events:
                    self._generated += event.token_id is not None
                    self._last_event = time.monotonic()
                    stream.deliver([(index, event)])
            self._finished += 1
        except UserError as error:
            stream.fail(error)
        except Exception as error:
            why = error if self._is_up() else "it has ended, and is started again"
            stream.fail(f"{self._driver.name} did not answer: {why}")
        finally:
            self._open -= 1
            if (task := asyncio.current_task()) is not None:
                self._tasks.discard(task)

    async def _events(self, ask: Ask) -> AsyncGenerator[TokenEvent, None]:
        if ask.params.max_new_tokens == 0:
            yield TokenEvent(0, None, "length")
            return
        try:
            # Closing the answer closes the connection, at which the program ends it.
            async with aclosing(self._driver.answer(self._client(), ask)) as answer:
                async for event in answer:
                    yield event
                    if event.finish_reason is not None:
                        return
        except NetError as error:
            if error.status in REFUSALS:
                raise UserError(f"{self._driver.name} refuses the request: {error}") from None
            raise EngineError(str(error)) from None
        raise EngineError("the answer broke off")

    def _client(self) -> EventClient:
        """One for each event loop and each start of the program."""
        loop = asyncio.get_running_loop()
        url, client = self._clients.get(loop, ("", None))
        if client is None or url != self._url:
            if client is not None:
                self._tasks.add(loop.create_task(client.close()))
            client = EventClient(self._url, api_key=self._key)
            self._clients[loop] = self._url, client
        return client

    async def embed(self, prompts: Sequence[Prompt], adapter: str | None = None) -> list[list[float]]:
        raise UserError(
            f"{self._driver.name}: embeddings are not computed there", hint="use the local engine"
        )

    async def load_adapter(self, name: str, folder: Path) -> None:
        self._refuse_when_over()
        client = self._client()
        await self._driver.load_adapter(client, name, folder)
        try:
            await check_adapters(self._driver, client, self._probe, [name])
        except UserError:
            await self._driver.unload_adapter(client, name)
            raise

    async def unload_adapter(self, name: str) -> None:
        self._refuse_when_over()
        await self._driver.unload_adapter(self._client(), name)

    def close(self, *, grace_s: float) -> None:
        self._leaving = True
        end = time.monotonic() + grace_s
        while self._open and time.monotonic() < end:
            time.sleep(0.02)
        self._closing = True
        self._wake.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(30.0)
        for task in list(self._tasks):
            with suppress(RuntimeError):  # its loop has ended
                task.get_loop().call_soon_threadsafe(task.cancel)
        for loop, (_, client) in list(self._clients.items()):
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(client.close(), loop)

    # -- the thread that keeps the program running -----------------------------------------------------

    def _watch(self) -> None:
        # This thread lives as long as the program: the signal at the parent's death comes when the thread
        # ends that started it.
        back_off = BackOff(first_s=1.0, longest_s=15.0, settled_s=STEADY_S)
        try:
            while not self._leaving and self._failure is None:
                began = time.monotonic()
                reason = self._run_once()
                self._ready = False
                if self._leaving:
                    return
                back_off.ended(lived_s=time.monotonic() - began)
                if not self._known.is_set() or back_off.failures == MOST_FAILURES:
                    self._failure = reason
                    return
                self._restarts += 1
                pause = back_off.next_pause_s()
                say(f"{reason}; starting it again in {pause:g} s")
                self._wake.wait(pause)
        except UserError as error:
            self._refused, self._failure = error, error.what
        except Exception as error:
            self._failure = f"{self._driver.name}: {error}"
        finally:
            self._ready = False
            self._known.set()

    def _run_once(self) -> str:
        """Start the program and stay with it until it ends or hangs; how it ended."""
        port = free_port()
        key = secrets.token_urlsafe(32)
        command = self._driver.command(port, key)
        begin = self._log.stat().st_size if self._log.is_file() else 0
        process = self._process = proc.start(
            _tied(command.args), log=self._log, env={**os.environ, **command.env}, session=True
        )
        try:
            self._url, self._key = f"http://127.0.0.1:{port}", key
            if not self._becomes_ready(process):
                return self._why(process, begin)
            self._ready = True
            self._known.set()
            return self._stay(process, begin)
        finally:
            proc.end_session(process, grace_s=10.0)

    def _becomes_ready(self, process: proc.Process) -> bool:
        end = time.monotonic() + self._start_timeout_s
        headers = {"Authorization": f"Bearer {self._key}"}
        while process.poll() is None and not self._leaving and time.monotonic() < end:
            if local_status(self._url + self._driver.health, headers=headers) == 200:
                return asyncio.run(self._ask_itself(prepare=True))
            self._wake.wait(POLL_S)
        return False

    def _stay(self, process: proc.Process, begin: int) -> str:
        """Until the program ends, or two own questions in a row get no token while nobody else gets one."""
        silent, next_probe = 0, time.monotonic() + PROBE_EVERY_S
        while not self._closing:
            if process.poll() is not None:
                return self._why(process, begin)
            if time.monotonic() >= next_probe:
                if time.monotonic() - self._last_event < PROBE_EVERY_S or asyncio.run(self._ask_itself()):
                    silent = 0
                else:
                    silent += 1
                if silent == 2:
                    return f"{self._driver.name} runs but generates no token any more"
                next_probe = time.monotonic() + PROBE_EVERY_S
            self._wake.wait(POLL_S)
        return CLOSING

    async def _ask_itself(self, *, prepare: bool = False) -> bool:
        """True when it generates a token after the probe."""
        client = EventClient(self._url, api_key=self._key)
        ask = Ask(self._probe, SamplingParams(max_new_tokens=1))
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                if prepare:
                    await self._driver.prepare(client)
                    await check_adapters(self._driver, client, self._probe, self._driver.adapters)
                async with aclosing(self._driver.answer(client, ask)) as answer:
                    async for event in answer:
                        if event.token_id is not None:
                            return True
        except (TimeoutError, NetError, EngineError) as error:
            say(f"{self._driver.name} did not generate a token: {error}")
        finally:
            await client.close()
        return False

    def _why(self, process: proc.Process, begin: int) -> str:
        code = process.poll()
        ended = f"ended with code {code}" if code is not None else "did not become ready"
        return f"{self._driver.name} {ended}{_tail(self._log, begin)}"


def _tied(args: Sequence[str]) -> list[str]:
    """The same program, ended when we die: by util-linux's setpriv, which becomes it, where that is here."""
    if shutil.which("setpriv") is None:
        return list(args)
    return ["setpriv", "--pdeathsig", "SIGTERM", *args]


def _tail(log: Path, begin: int, *, most: int = 1500) -> str:
    """The end of what the program wrote since `begin`, as text to append."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read()[-most:].decode(errors="replace").strip()
    return f":\n{text}" if text else ""
