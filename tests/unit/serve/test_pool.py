"""Several engines behind one: who answers, and what happens when one dies, hangs or cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serve import counting_engine
from tests.unit.serve.counting_engine import HANG
from tests.unit.serve.test_process_engine import ask, is_gone, tokens_of, until
from tunesmith.core.errors import UserError
from tunesmith.serve.engine import AnswerStream, EngineError
from tunesmith.serve.pool import Care, Pool
from tunesmith.serve.process_engine import ProcessEngine

COMMAND = [sys.executable, str(counting_engine.__file__)]
CARE = Care(look_every_s=0.01, silence_s=1.0, probe_s=1.0, pause_s=0.05)


class Engines:
    """Makes the engines of a pool, and remembers them in their order."""

    def __init__(self, **description: Any) -> None:
        self.made: list[ProcessEngine] = []
        self._description = {"max_concurrent": 2} | description

    def __call__(self) -> ProcessEngine:
        self.made.append(ProcessEngine(COMMAND, dict(self._description)))
        return self.made[-1]

    def break_the_next(self) -> None:
        self._description["fault"] = True

    def mend(self) -> None:
        self._description.pop("fault")


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def one(engines: Engines) -> Iterator[Pool]:
    pool = Pool(engines, care=CARE)
    pool.start()
    yield pool
    pool.close(grace_s=0)


def loads(engines: Engines) -> list[int]:
    return [engine.status().running + engine.status().waiting for engine in engines.made]


async def fails_with(stream: AnswerStream, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        await tokens_of(stream)


def test_two_share_the_load_and_one_alone_goes_on(engines: Engines, tmp_path: Path) -> None:
    pool = Pool(engines, 2, care=CARE)
    assert pool.start()["pid"] in [engine.pid for engine in engines.made]

    async def run() -> None:
        streams = [pool.submit([ask(i, tokens=900)]) for i in range(6)]
        assert loads(engines) == [3, 3]
        status = pool.status()
        assert (status.running + status.waiting, status.ready, status.restarts) == (6, True, 0)
        await pool.load_adapter("new", tmp_path)
        assert [engine.status().adapters for engine in engines.made] == [("new",), ("new",)]
        with pytest.raises(UserError, match="does not fit"):
            await pool.load_adapter("bad", tmp_path / "nothing")
        os.kill(engines.made[0].pid or 0, signal.SIGKILL)
        await until(lambda: not engines.made[0].status().alive)
        # The other one is there all the time.
        assert pool.status().ready
        assert await tokens_of(pool.submit([ask(1, tokens=1, adapter="new")])) == {0: [102]}
        assert await pool.embed([[1, 2, 3]], "new") == [[3.0, 0.5]]
        for stream in streams:
            stream.cancel()

    asyncio.run(run())
    pool.close(grace_s=0)
    assert not pool.status().alive
    assert all(is_gone(engine.pid or 0) for engine in engines.made)


def test_the_same_beginning_goes_to_the_same_engine_when_none_has_work() -> None:
    """What an engine has in its cache it need not compute."""
    engines = Engines()
    pool = Pool(engines, 2, care=CARE)
    pool.start()

    async def run() -> None:
        for first in range(1, 9):
            used = set()
            for _ in range(2):
                stream = pool.submit([ask(*[first] * 64, 5, tokens=1)])
                used.add(loads(engines).index(1))
                await tokens_of(stream)
            assert len(used) == 1
        totals = [engine.status().finished for engine in engines.made]
        assert min(totals) > 0, totals

    asyncio.run(run())
    pool.close(grace_s=0)


def test_a_dead_engine_is_started_again_with_its_adapters(
    one: Pool, engines: Engines, tmp_path: Path
) -> None:
    async def run() -> None:
        await one.load_adapter("kept", tmp_path)
        await one.load_adapter("gone", tmp_path)
        await one.unload_adapter("gone")
        assert await tokens_of(one.submit([ask(1, tokens=2)])) == {0: [2, 3]}
        await until(lambda: one.status().finished == 1)
        stream = one.submit([ask(1, tokens=900)])
        os.kill(engines.made[0].pid or 0, signal.SIGKILL)
        await fails_with(stream, "SIGKILL")
        with pytest.raises(EngineError, match="SIGKILL"):
            one.submit([ask(1)])
        status = one.status()
        assert (status.alive, status.ready) == (True, False)
        await until(lambda: one.status().ready)
        status = one.status()
        assert (status.restarts, status.adapters, status.failure) == (1, ("kept",), None)
        assert status.finished == 1, "what the dead one did is forgotten"
        assert await tokens_of(one.submit([ask(1, tokens=1, adapter="kept")])) == {0: [102]}
        assert is_gone(engines.made[0].pid or 0)

    asyncio.run(run())


def test_one_that_hangs_is_found_by_its_silence_and_replaced(one: Pool, engines: Engines) -> None:
    async def run() -> None:
        await fails_with(one.submit([ask(HANG)]), "has work and has produced nothing")
        await until(lambda: one.status().ready)
        assert one.status().restarts == 1
        assert await tokens_of(one.submit([ask(1, tokens=1)])) == {0: [2]}
        assert is_gone(engines.made[0].pid or 0)

    asyncio.run(run())


def test_one_that_cannot_start_again_is_tried_until_it_can(one: Pool, engines: Engines) -> None:
    async def run() -> None:
        engines.break_the_next()
        os.kill(engines.made[0].pid or 0, signal.SIGKILL)
        await until(lambda: one.status().restarts >= 2)
        assert not one.status().ready
        assert "no such model" in str(one.status().failure)
        with pytest.raises(EngineError, match="no such model"):
            one.submit([ask(1)])
        engines.mend()
        await until(lambda: one.status().ready)
        assert await tokens_of(one.submit([ask(1, tokens=1)])) == {0: [2]}

    asyncio.run(run())


def test_what_does_not_load_at_first_is_raised() -> None:
    engines = Engines(fault=True)
    pool = Pool(engines, 2, care=CARE)
    with pytest.raises(UserError, match="no such model"):
        pool.start()
    assert not pool.status().alive
    assert all(is_gone(engine.pid or 0) for engine in engines.made)


def test_close_lets_running_requests_finish(one: Pool) -> None:
    async def run() -> None:
        stream = one.submit([ask(1, tokens=60)])
        closing = asyncio.create_task(asyncio.to_thread(one.close, grace_s=30))
        assert len((await tokens_of(stream))[0]) == 60
        await closing
        with pytest.raises(EngineError, match="shutting down"):
            one.submit([ask(1)])

    asyncio.run(run())
