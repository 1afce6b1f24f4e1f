"""Several engines of one model behind one `Engine`: the least loaded answers, a dead one is started again."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.progress import say
from tunesmith.model.requests import SamplingParams
from tunesmith.serve.back_off import BackOff
from tunesmith.serve.engine import AnswerStream, Ask, Engine, EngineError, EngineStatus, Prompt

CLOSING = "the server is shutting down"
PREFIX_TOKENS = 64
COUNTERS = ("finished", "cancelled", "generated_tokens", "prompt_tokens", "cached_tokens", "preempted")
AMOUNTS = ("running", "waiting", "cache_tokens", "cache_capacity")


class Restartable(Engine, Protocol):
    """One engine of a pool, from its start to its end; after that another one takes its place."""

    def start(self) -> dict[str, Any]:
        """Begin to compute, and return what it tells of itself once a token was generated."""
        ...

    def abandon(self, reason: str) -> None:
        """End it at once; its requests end with an error that says why."""
        ...


@dataclass(frozen=True, kw_only=True)
class Care:
    """How engines are watched; all in seconds.

    silence_s: an engine that has work and produces nothing for so long is asked a question of its own, and
    started again when it does not answer that either within probe_s. The pause before a new start begins
    with pause_s and doubles up to longest_pause_s; an engine that has lived for settled_s begins anew. One
    that has died or failed to start failures_told times counts as dead, though it is tried on.
    """

    look_every_s: float = 0.1
    silence_s: float = 30.0
    probe_s: float = 30.0
    pause_s: float = 0.5
    longest_pause_s: float = 30.0
    settled_s: float = 60.0
    failures_told: int = 5


class Pool:
    """`count` engines, each made by `make` as often as it must be started.

    Of the facts that an engine tells at its start, `adapters` (name: folder of those that it loads by itself)
    and `probe` (a prompt for questions of the pool's own) matter here.
    """

    def __init__(
        self,
        make: Callable[[], Restartable],
        count: int = 1,
        *,
        care: Care | None = None,
    ) -> None:
        self._own: dict[str, Path] = {}
        self._wanted: dict[str, Path] = {}
        self._changing = threading.Lock()
        self._care = care or Care()
        self._probe: Prompt = (0,)
        self._closed = threading.Event()
        self._members = [_Member(self, number, make) for number in range(count)]

    @property
    def care(self) -> Care:
        return self._care

    @property
    def closed(self) -> threading.Event:
        return self._closed

    def start(self) -> dict[str, Any]:
        """Start all engines and return the facts of the first. Raises the error of one that cannot start."""
        with ThreadPoolExecutor(len(self._members)) as threads:
            started = [threads.submit(member.start) for member in self._members]
            errors = [error for future in started if (error := future.exception())]
        if errors:
            self.close(grace_s=0.0)
            raise errors[0]
        facts = started[0].result()
        self._own = {name: Path(folder) for name, folder in (facts.get("adapters") or {}).items()}
        self._wanted = dict(self._own)
        self._probe = facts.get("probe") or self._probe
        for member in self._members:
            member.watch()
        return facts

    def submit(self, asks: Sequence[Ask]) -> AnswerStream:
        """As an engine's: by the least loaded; of equals by one that has seen such a beginning before."""
        if self._closed.is_set():
            raise EngineError(CLOSING)
        first = hash(tuple(asks[0].prompt[:PREFIX_TOKENS]))
        ranked = sorted(
            self._ready(),
            key=lambda found: (found[2].running + found[2].waiting, (first + found[0]) % len(self._members)),
        )
        refused: EngineError | None = None
        for _, engine, _ in ranked:
            try:
                return engine.submit(asks)
            except EngineError as error:
                refused = error
        raise refused or EngineError(self._reason())

    async def embed(self, prompts: Sequence[Prompt], adapter: str | None = None) -> list[list[float]]:
        ready = self._ready()
        if not ready:
            raise EngineError(self._reason())
        _, engine, _ = min(ready, key=lambda entry: entry[2].running + entry[2].waiting)
        return await engine.embed(prompts, adapter)

    async def load_adapter(self, name: str, folder: Path) -> None:
        """In every engine; when one refuses, all are as they were before."""
        with self._changing:
            before = self._wanted.get(name)
            self._wanted[name] = folder
            engines = [engine for _, engine, _ in self._ready()]
        done: list[Engine] = []
        try:
            for engine in engines:
                await engine.load_adapter(name, folder)
                done.append(engine)
        except EngineError:
            # The engine that has just died loads it when it is started again.
            if not done:
                self._forget(name, before)
                raise
        except UserError:
            self._forget(name, before)
            for engine in done:
                await (engine.load_adapter(name, before) if before else engine.unload_adapter(name))
            raise
        if not engines:
            self._forget(name, before)
            raise EngineError(self._reason())

    def _forget(self, name: str, before: Path | None) -> None:
        with self._changing:
            if before is None:
                self._wanted.pop(name, None)
            else:
                self._wanted[name] = before

    async def unload_adapter(self, name: str) -> None:
        with self._changing:
            self._wanted.pop(name, None)
        for _, engine, _ in self._ready():
            await engine.unload_adapter(name)

    def status(self) -> EngineStatus:
        """Sums over the engines, those that have died included; ready when one of them is."""
        found = [member.status() for member in self._members]
        sums = {name: sum(getattr(one, name) for one in found) for name in (*COUNTERS, *AMOUNTS, "restarts")}
        ready = any(one.ready for one in found)
        adapters = {name for one in found if one.ready for name in one.adapters}
        return EngineStatus(
            alive=not self._closed.is_set() and any(one.alive for one in found),
            ready=ready and not self._closed.is_set(),
            failure=None if ready else next((one.failure for one in found if one.failure), None),
            adapters=tuple(sorted(adapters)),
            **sums,
        )

    def statuses(self) -> dict[str, EngineStatus]:
        """Of every engine, by its number; what those before it in its place have done included."""
        return {str(number): member.status() for number, member in enumerate(self._members)}

    def close(self, *, grace_s: float) -> None:
        """All engines together have `grace_s` seconds."""
        self._closed.set()
        with ThreadPoolExecutor(len(self._members)) as threads:
            for member in self._members:
                threads.submit(member.close, grace_s)

    def abandon(self) -> None:
        """End all engines at once; their requests end with an error."""
        self._closed.set()
        for member in self._members:
            member.abandon()

    def settle_adapters(self, engine: Engine, publish: Callable[[], None]) -> None:
        """Give a new engine the adapters of this moment, and no others; then `publish` it."""
        asyncio.run(self._settle(engine, publish))

    async def _settle(self, engine: Engine, publish: Callable[[], None]) -> None:
        held = dict(self._own)
        while True:
            with self._changing:
                wanted = dict(self._wanted)
                if held == wanted:
                    publish()
                    return
            for name in held.keys() - wanted.keys():
                await engine.unload_adapter(name)
            for name, folder in wanted.items():
                if held.get(name) != folder:
                    await self._load_again(engine, name, folder)
            held = wanted

    async def _load_again(self, engine: Engine, name: str, folder: Path) -> None:
        try:
            await engine.load_adapter(name, folder)
        except UserError as error:
            say(f"the adapter '{name}' could not be loaded again: {error.what}")

    def ask_for_a_token(self, engine: Engine) -> bool:
        """Whether the engine generates a token of its own within `probe_s`."""
        return asyncio.run(self._generates(engine))

    async def _generates(self, engine: Engine) -> bool:
        try:
            stream = engine.submit([Ask(self._probe, SamplingParams(max_new_tokens=1))])
            async with asyncio.timeout(self._care.probe_s):
                async for _ in stream:
                    pass
        except (EngineError, UserError, TimeoutError):
            return False
        return True

    def _ready(self) -> list[tuple[int, Engine, EngineStatus]]:
        found: list[tuple[int, Engine, EngineStatus]] = []
        for number, member in enumerate(self._members):
            engine = member.engine
            if engine is not None and (status := engine.status()).ready:
                found.append((number, engine, status))
        return found

    def _reason(self) -> str:
        failure = self.status().failure
        return f"no engine is ready: {failure or 'it is being started'}"


class _Member:
    """One place of the pool: the engine in it, and the thread that watches it."""

    def __init__(self, pool: Pool, number: int, make: Callable[[], Restartable]) -> None:
        self._pool, self._care, self._number, self._make = pool, pool.care, number, make
        self.engine: Restartable | None = None
        self._starting: Restartable | None = None
        self._restarts = 0
        self._back_off = BackOff(self._care.pause_s, self._care.longest_pause_s, self._care.settled_s)
        self._failure: str | None = None
        self._lost = dict.fromkeys(COUNTERS, 0)
        self._thread = threading.Thread(target=self._watch, name=f"tunesmith-pool-{number}", daemon=True)

    def start(self) -> dict[str, Any]:
        self._starting = engine = self._make()
        facts = engine.start()
        self._publish(engine)
        return facts

    def watch(self) -> None:
        self._thread.start()

    def status(self) -> EngineStatus:
        engine = self.engine
        if engine is None:
            alive = self._back_off.failures < self._care.failures_told
            now = EngineStatus(
                alive=alive, ready=False, running=0, waiting=0, finished=0, cancelled=0, generated_tokens=0,
                failure=self._failure,
            )  # fmt: skip
        else:
            now = engine.status()
            # One that has just died is about to be started again: the place as a whole still works.
            now = replace(now, alive=True)
        lost = {name: getattr(now, name) + self._lost[name] for name in COUNTERS}
        return replace(now, restarts=self._restarts, **lost)

    def close(self, grace_s: float) -> None:
        for engine in (self._starting, self.engine):
            if engine is not None:
                engine.close(grace_s=grace_s)

    def abandon(self) -> None:
        for engine in (self._starting, self.engine):
            if engine is not None:
                engine.abandon(CLOSING)

    def _watch(self) -> None:
        closed = self._pool.closed
        while not closed.is_set():
            assert self.engine is not None
            born = time.monotonic()
            reason = self._watch_one(self.engine)
            if closed.is_set():
                return
            self._bury(self.engine, reason)
            self._back_off.ended(lived_s=time.monotonic() - born)
            while self.engine is None and not closed.is_set():
                self._start_again()

    def _watch_one(self, engine: Restartable) -> str:
        """Until the engine is dead or does not answer; why."""
        seen, since = None, time.monotonic()
        while not self._pool.closed.wait(self._care.look_every_s):
            status = engine.status()
            if not status.alive:
                return status.failure or "the engine ended"
            now = (status.generated_tokens, status.prompt_tokens, status.finished, status.cancelled)
            # One that is not ready, though it once was, has fallen silent altogether.
            if now != seen or (status.ready and not (status.running or status.waiting)):
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._care.silence_s:
                if not self._pool.ask_for_a_token(engine):
                    return (
                        f"the engine has work and has produced nothing for {time.monotonic() - since:.0f} s"
                    )
                since = time.monotonic()
        return CLOSING

    def _bury(self, engine: Restartable, reason: str) -> None:
        self._failure = reason
        engine.abandon(reason)
        last = engine.status()
        for name in COUNTERS:
            self._lost[name] += getattr(last, name)
        self.engine = None

    def _start_again(self) -> None:
        pause = self._back_off.next_pause_s()
        self._restarts += 1
        say(f"engine {self._number + 1}: {self._failure}; it is started again in {pause:g} s")
        if self._pool.closed.wait(pause):
            return
        self._starting = engine = self._make()
        try:
            engine.start()
            self._pool.settle_adapters(engine, lambda: self._publish(engine))
        except Exception as error:
            self._failure = error.what if isinstance(error, TunesmithError) else str(error)
            engine.abandon(self._failure)
            return
        if self._pool.closed.is_set():
            engine.close(grace_s=0.0)
            return
        say(f"engine {self._number + 1}: answers again")

    def _publish(self, engine: Restartable) -> None:
        self.engine, self._starting = engine, None
